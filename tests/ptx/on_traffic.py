"""The counts for test_traffic.py, made in a process in which Triton compiles."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from qwenkern import kernels as ops
from qwenkern.benchmarks.offline.ptx.traffic import Traffic, traffic
from qwenkern.kernels.language import prefetch


@triton.jit
def _rows(out_ptr, x_ptr, table_ptr, counter_ptr, STRIDE: tl.constexpr):
    """128 floats of row table[0], STRIDE apart, and the next row's prefetched."""
    row = tl.load(table_ptr)
    at = tl.arange(0, 128) * STRIDE
    prefetch(x_ptr + (row + 1) * 4096 + at, at >= 0)
    tl.store(out_ptr + tl.program_id(0) * 128 + tl.arange(0, 128), tl.load(x_ptr + row * 4096 + at, mask=at >= 32))
    tl.atomic_add(counter_ptr, 1)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def rows(stride: int) -> list[Traffic]:
    """Of the last program of five."""
    table, counter = meta(1, dtype=torch.int32), meta(1, dtype=torch.int32)
    out, x = meta(5, 128, dtype=torch.float32), meta(8, 4096, dtype=torch.float32)
    return traffic(
        "sm_90",
        lambda: _rows[(5,)](out, x, table, counter, stride, num_warps=1),
        lambda grid: (grid[0] - 1, 0, 0),
        {"table_ptr": 6},
    )


CALLS: dict[str, Callable[[], object]] = {
    "down": lambda: ops.linear(meta(1, 11008), meta(2048, 11008)),
    "decode_attention": lambda: ops.decode_attention(
        meta(2, 16, 128),
        (meta(40, 64, 2, 128), meta(40, 64, 2, 128)),
        meta(2, 20, dtype=torch.int32),
        meta(2, dtype=torch.int32),
        0.1,
    ),
}


def op(name: str, length: int = 1) -> list[Traffic]:
    return traffic("sm_90", CALLS[name], fill={"lengths_ptr": length})
