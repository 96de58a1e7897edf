"""The C backend: the ops of the graph on a CPU, in bfloat16 and float32. The library is compiled with the package, or
at the first use.

For one token, torch reads bfloat16 weights at half of the memory's bandwidth. The C functions read weights at the full
bandwidth, keep no second copy of them, and multiply many tokens near the processor's peak. choose.py measures once
which instructions are fastest. If there is neither a library nor a compiler, a warning says so once, and torch runs.

An op has the signature of its contract. ``refuses_<op>`` has the same arguments; it returns the reason why C does not
take them, or None. It compiles, allocates and measures nothing: ``prepare`` does that.

    Python, named like the contracts                 C
    linear, lm_head, qkv_rope                        linear.h, linear_few_tokens.c, linear_many_tokens.c;
                                                     of quantised weights linear_grouped.c, grouped_products.c
    attention                                        attention.h, decode_attention.c, prefill_attention.c
    rms_norm, rope, swiglu, embedding                norm.h, rms_norm.c, rope.c, swiglu.c, embedding.c
    draw                                             draw.h, draw.c
    repack            blocks of GGUF files           repack.c, blocks.h
    repack_words      words of GPTQ, AWQ and others  repack_words.c
    backend.py, ops.py: the backend, its list of ops ops.c: enters an op
                                                     float_activations.c: all of these files again, for float32

    calls.py          calls, read from calls.h       calls.h       the arguments of every op
    weights.py        weights as structs             weights.h; dense_weight.h; all quantised formats: grouped_weight.h
                                                     planes.h: x as int8, dots.h: the instructions of each processor
    pages.py          cache pages as structs         pages.h, and a file for each format: dense_pages.h;
                                                     pages_block.h reads blocks, pages_store.h stores
    limits.py         what the ops take              limits.c
    recorded_calls.py calls recorded and replayed    team.h, team.c  the threads that run the calls
    threads.py        how many threads               plain.c       every op as simple loops: read this first
    build.py          the library in use             vectors.h     registers of each width
    compiler.py       how it is compiled             operands.h    the operands of products
    targets.py        for which processors           panels.h      products of many rows
    choose.py         what is fastest                ceilings.c    loops that measure the processor's limits
    kept.py           the folder of measurements     codes.h       8 and 16 bits as floats
                      and compiled libraries
"""

from . import threads
from .build import check_environment, describe, library, prepare, prepared, renew, target
from .recorded_calls import CannotRecord, RecordedCalls, is_recording, play

__all__ = [
    "CannotRecord",
    "RecordedCalls",
    "check_environment",
    "describe",
    "is_recording",
    "library",
    "play",
    "prepare",
    "prepared",
    "renew",
    "target",
    "threads",
]
