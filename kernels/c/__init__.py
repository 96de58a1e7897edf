"""The C backend: the ops of the graph on a CPU in bfloat16, compiled with the package or else at the first use.

torch reads bfloat16 weights for one token at half of the memory's bandwidth; this reads them at what the memory gives,
without a second copy of them, and multiplies many tokens near the processor's peak. Which instructions do so is
measured once (choose.py). Where there is neither a library nor a compiler, a warning says so once and torch runs.

Each op has the signature of the public op, and beside it ``refuses_<op>`` of the same arguments: why C does not take
them, in words, or None. A refusal compiles, allocates and measures nothing: ``prepare`` does that.

    Python, a file for each family of ops            C
    linear, lm_head, qkv_rope                        linear.h, linear_few_tokens.c, linear_many_tokens.c
    attention                                        attention.h, decode_attention.c, prefill_attention.c
    rms_norm, rope, swiglu, embedding                norm.h, rms_norm.c, rope.c, swiglu.c, embedding.c

    calls.py         calls, read from calls.h        calls.h       the arguments of every op
    formats.py       weights and pages as structs    weights.h, dense_weight.h, pages.h, dense_pages.h
    limits.py        what the ops take               limits.c
    recorded_calls   calls recorded and replayed     team.h, team.c  the threads that carry calls out
    threads.py       how many threads                plain.c       every op as the simplest loops: read this first
    build.py         the library in use              vectors.h     registers of each width
    compiler.py      how it is compiled              operands.h    what is multiplied
    targets.py       for which processors            panels.h      products of many rows
    choose.py        what is fastest                 ceilings.c    loops that benchmarks take shares of
    kept.py          where what is compiled or measured here is kept
"""

from collections.abc import Callable
from typing import Any

from ..environment import KERNELS
from . import threads
from .attention import decode_attention, prefill_attention, refuses_decode_attention, refuses_prefill_attention
from .build import NOT_PREPARED, check_environment, describe, library, prepare, prepared, renew, target
from .embedding import embedding, refuses_embedding
from .linear import (
    linear,
    norm_linear,
    norm_swiglu_linear,
    refuses_linear,
    refuses_norm_linear,
    refuses_norm_swiglu_linear,
)
from .lm_head import lm_head, refuses_lm_head
from .qkv_rope import norm_qkv_rope, refuses_norm_qkv_rope
from .recorded_calls import CannotRecord, RecordedCalls, is_recording, play
from .rms_norm import add_rms_norm, refuses_add_rms_norm, refuses_rms_norm, rms_norm
from .rope import apply_rope, refuses_apply_rope, refuses_rope_and_cache, rope_and_cache
from .swiglu import refuses_silu_mul, refuses_swiglu, silu_mul, swiglu

__all__ = [
    "NOT_PREPARED",
    "CannotRecord",
    "RecordedCalls",
    "add_rms_norm",
    "apply_rope",
    "check_environment",
    "decode_attention",
    "describe",
    "embedding",
    "is_recording",
    "library",
    "linear",
    "lm_head",
    "norm_linear",
    "norm_qkv_rope",
    "norm_swiglu_linear",
    "play",
    "prefill_attention",
    "prepare",
    "prepared",
    "refuses_add_rms_norm",
    "refuses_apply_rope",
    "refuses_decode_attention",
    "refuses_embedding",
    "refuses_linear",
    "refuses_lm_head",
    "refuses_norm_linear",
    "refuses_norm_qkv_rope",
    "refuses_norm_swiglu_linear",
    "refuses_prefill_attention",
    "refuses_rms_norm",
    "refuses_rope_and_cache",
    "refuses_silu_mul",
    "refuses_swiglu",
    "renew",
    "rms_norm",
    "rope_and_cache",
    "silu_mul",
    "swiglu",
    "takes",
    "target",
    "threads",
]


def takes(refuses: Callable[..., str | None], *given: Any) -> bool:
    """Whether C takes these arguments: the call sites' question until they are backends of a list."""
    if KERNELS.get() == "reference":
        return False
    reason = refuses(*given)
    if reason == NOT_PREPARED:
        prepare()
        reason = refuses(*given)
    return reason is None
