"""The sums of the partial results of decode_attention.py: of the slices of a program, and of the splits of a
sequence."""

from __future__ import annotations

import triton
import triton.language as tl

from ..language import cast, divide, exp2


@triton.jit
def _halved(x, SLICES: tl.constexpr):
    """x [G, D, 2 * SLICES], the sums of its pairs."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1], SLICES, 2]))
    return even + odd


@triton.jit
def sum_of_slices(x, SLICES: tl.constexpr):
    """The sum of x [SLICES, D, G] over its slices, 1, 2 or 4, as [G, D]. tl.sum would shuffle each value between
    threads, and needs more registers."""
    x = tl.permute(x, [2, 1, 0])
    if SLICES == 4:
        x = _halved(x, 2)
    if SLICES >= 2:
        x = _halved(x, 1)
    return tl.reshape(x, [x.shape[0], x.shape[1]])


@triton.jit
def combine(
    out_ptr,  # [S, Hq, D]
    parts_ptr,  # [S, Hq, splits, D] float32
    logs_ptr,  # [S, Hq, splits] float32
    first_head,
    used,  # splits that have a result
    splits,  # that parts and logs have room for
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    IN_FLIGHT: tl.constexpr,  # parts that are loaded at once
):
    """The weighted sum of the splits, in their order. Other programs wrote them, so the loads go past the L1 cache."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, HEAD_DIM)
    head = first_head + tl.minimum(row, GROUP - 1)
    dtype = out_ptr.dtype.element_ty
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    for first in range(0, used, IN_FLIGHT):
        split = first + tl.arange(0, IN_FLIGHT)[:, None]
        at_part = head[None, :] * splits + split
        at = at_part[:, :, None] * HEAD_DIM + column[None, None, :]
        parts = tl.load(parts_ptr + at, mask=(split < used)[:, :, None], other=0.0, cache_modifier=".cg")
        logs = tl.load(logs_ptr + at_part, mask=split < used, other=float("-inf"), cache_modifier=".cg")
        new_best = tl.maximum(best, tl.max(logs, axis=0))
        weights = exp2(logs - new_best[None, :], dtype)
        shrink = exp2(best - new_best, dtype)
        total = total * shrink + tl.sum(weights, axis=0)
        acc = acc * shrink[:, None] + tl.sum(weights[:, :, None] * parts, axis=0)
        best = new_best
    out = cast(divide(acc, total[:, None], dtype), dtype)
    tl.store(out_ptr + head[:, None] * HEAD_DIM + column[None, :], out, mask=row[:, None] < GROUP)
