"""The ops of the graph on a CPU in bfloat16, in C, compiled when the package is built or else at the first use.

torch reads bfloat16 weights for one token at half of the memory's bandwidth; this reads them at what the memory gives,
without a second copy of them, and multiplies many tokens near the processor's peak. Which instructions do so is
measured once (choose.py). Where there is neither a library nor a compiler, a warning says so once and torch runs. A
Tape is to these ops what a CUDA graph is to kernels: it plays a whole step in one call.

    ops.py       which tensors it takes, and the calls    vectors.h   registers of each width
    call.py      one call                                 panels.h    products of many rows
    tape.py      calls recorded and replayed              common.h    calls, and how loops are shared out
    build.py     the library in use                       team.c      threads
    compiler.py  how it is compiled                       linear.c, attention.c, step.c   the ops
    targets.py   which processors it is compiled for      ceilings.c  loops that benchmarks take shares of
    choose.py    what is fastest                          threads.py  how many threads run them
    kept.py      where what is made or measured here is kept
"""

from . import threads
from .build import check_environment, describe, library, multiplies, renew, target
from .call import OPS
from .ops import (
    MAX_TOKENS,
    SPLIT,
    add_rms_norm,
    apply_rope,
    decode_attention,
    embedding,
    linear,
    prefill_attention,
    rms_norm,
    rope_and_cache,
    silu_mul,
    swiglu,
    takes_gate,
    takes_heads,
    takes_linear,
    takes_norm,
    takes_prefill,
    takes_rope,
    takes_rows,
)
from .tape import NotRecordable, Tape, is_recording, play

__all__ = [
    "MAX_TOKENS",
    "OPS",
    "SPLIT",
    "NotRecordable",
    "Tape",
    "add_rms_norm",
    "apply_rope",
    "check_environment",
    "decode_attention",
    "describe",
    "embedding",
    "is_recording",
    "library",
    "linear",
    "multiplies",
    "play",
    "prefill_attention",
    "renew",
    "rms_norm",
    "rope_and_cache",
    "silu_mul",
    "swiglu",
    "takes_gate",
    "takes_heads",
    "takes_linear",
    "takes_norm",
    "takes_prefill",
    "takes_rope",
    "takes_rows",
    "target",
    "threads",
]
