"""Runs a Triton kernel as on an H100, without a GPU, and finds the race that it has without its barrier.

python examples/check_a_kernel.py
"""

import torch
import triton
import triton.language as tl

from qwenkern.benchmarks.offline.machine_code import DEVICES
from qwenkern.benchmarks.offline.ptx.device import device
from qwenkern.benchmarks.offline.ptx.faults import Fault


@triton.jit
def column_sums(out_ptr, parts_ptr, arrivals_ptr, x_ptr, rows, BLOCK: tl.constexpr, BARRIER: tl.constexpr):
    program, programs, column = tl.program_id(0), tl.num_programs(0), tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for row in range(program, rows, programs):
        total += tl.load(x_ptr + row * BLOCK + column)
    tl.store(parts_ptr + program * BLOCK + column, total)
    if BARRIER:
        tl.debug_barrier()  # without it, one warp tells the other programs of all warps' stores too early
    if tl.atomic_add(arrivals_ptr, 1, sem="acq_rel") == programs - 1:  # the last one adds the partial sums
        total = tl.zeros([BLOCK], tl.float32)
        for other in range(programs):
            total += tl.load(parts_ptr + other * BLOCK + column, cache_modifier=".cg")
        tl.store(out_ptr + column, total)


for barrier in (True, False):
    x, out, parts, arrivals = torch.randn(10, 256), torch.empty(256), torch.empty(4, 256), torch.zeros(1).int()
    try:
        with device(DEVICES["sm_90"], seed=1):
            column_sums[(4,)](out, parts, arrivals, x, 10, 256, barrier, num_warps=4)
        print("with its barrier: off by at most", (out - x.sum(0)).abs().max().item())
    except Fault as fault:
        print("without it:", fault)
