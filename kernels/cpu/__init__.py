"""The ops of the graph on a CPU in bfloat16, in C, compiled by the machine's own compiler at the first use and kept.

torch reads bfloat16 weights for one token at half of the memory's bandwidth; this reads them at what the memory gives,
without a second copy of them, and multiplies many tokens near the processor's peak. Which instructions do so is
measured once (choose.py). Where no C compiler works, a warning says so once and the torch twin runs. A Tape is to these
ops what a CUDA graph is to kernels: it plays a whole step in one call.

    ops.py    which tensors it takes, and the calls          common.h     numbers, vectors, what all of C shares
    call.py   one call                                       linear.c, attention.c, step.c
    tape.py   calls recorded and replayed
    build.py  the compiler; choose.py, what is fastest       ceilings.c: loops that benchmarks take shares of
"""

from .build import library, multiplies
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
    "decode_attention",
    "embedding",
    "is_recording",
    "library",
    "linear",
    "multiplies",
    "play",
    "prefill_attention",
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
]
