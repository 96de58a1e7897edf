"""Draws a token id for each row of logits, without sorting it.

Weights are whole numbers (see the contract), so atomic additions in any order give the same sums.

    program (r, p): tokens p * BLOCK .. of row r ─► count and weights of each interval of row r     _sum_kernel
    program (r, p): the same ─► their ids, by intervals                                             _gather_kernel
    program  r:     the intervals in which a sum ends ─► by bisection of logits, the sum or token   _draw_kernel

Tokens of weight 0, most of the vocabulary, are left out. An interval has about a hundred tokens; with many equal ones
the last kernel looks at more, BLOCK at a time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..draw import INTERVALS, INTERVALS_PER_UNIT, SCALE
from ..language import wait_for_inputs
from . import tuning
from .backend import TRITON, pdl_options
from .launching import planned

tuning.SPACES["draw"] = {"BLOCK": (512, 1024, 2048), "num_warps": (2, 4, 8)}  # of _sum_kernel
# Two tokens a thread, because they, or where they go, lie apart in memory
GATHER = DRAW = {"BLOCK": 512, "num_warps": 8}
_SCALE = tl.constexpr(SCALE)
_PER_UNIT = tl.constexpr(INTERVALS_PER_UNIT)
_INTERVALS = tl.constexpr(INTERVALS)


@triton.jit
def _weigh(logit, largest, temperature):
    """The weight as a part of the largest one, as a whole number, and its interval."""
    less = tl.math.div_rn(largest - logit, temperature)
    part = tl.exp(-less)
    weight = tl.where(part > 0, part * _SCALE, 0.0).to(tl.int64)  # 0 for NaN, too
    interval = tl.minimum(tl.where(weight > 0, less, 0.0) * _PER_UNIT, _INTERVALS - 1.0).to(tl.int32)
    return part, weight, interval


@triton.jit
def _key(logit):
    """A whole number in the order of the logits, equal only for equal ones."""
    bits = tl.where(logit == 0, 0.0, logit).to(tl.int32, bitcast=True)  # -0 becomes 0
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@planned
@triton.jit
def _sum_kernel(
    counts_ptr,  # [R, INTERVALS] int32
    sums_ptr,  # [R, INTERVALS] int64
    kept_ptr,  # [R] int64: the sum of the weights that min_p keeps
    logits_ptr,  # [R, V] float32
    largest_ptr,  # [R] float32
    settings_ptr,  # [4, R] float32: temperature, top_k, top_p, min_p
    vocabulary,
    logits_stride,
    settings_stride,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)

    wait_for_inputs(PDL)
    largest = tl.load(largest_ptr + row)
    temperature = tl.load(settings_ptr + row)
    min_p = tl.load(settings_ptr + 3 * settings_stride + row)
    logit = tl.load(logits_ptr + row * logits_stride + token, mask=token < vocabulary, other=float("-inf"))

    part, weight, interval = _weigh(logit, largest, temperature)
    at = row * _INTERVALS + interval
    tl.atomic_add(counts_ptr + at, 1, mask=weight > 0, sem="relaxed")
    tl.atomic_add(sums_ptr + at, weight, mask=weight > 0, sem="relaxed")
    tl.atomic_add(kept_ptr + row, tl.sum(tl.where(part < min_p, 0, weight), axis=0), sem="relaxed")


@planned
@triton.jit
def _gather_kernel(
    ids_ptr,  # [R, V] int32: token ids, those of an interval side by side in any order
    ends_ptr,  # [R, INTERVALS] int32: the places behind each interval; afterwards, of its first token
    logits_ptr,  # [R, V] float32
    largest_ptr,  # [R] float32
    settings_ptr,  # [4, R] float32
    vocabulary,
    logits_stride,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)

    wait_for_inputs(PDL)
    largest = tl.load(largest_ptr + row)
    temperature = tl.load(settings_ptr + row)
    logit = tl.load(logits_ptr + row * logits_stride + token, mask=token < vocabulary, other=float("-inf"))

    _, weight, interval = _weigh(logit, largest, temperature)
    end = tl.atomic_add(ends_ptr + row * _INTERVALS + interval, -1, mask=weight > 0, sem="relaxed")
    tl.store(ids_ptr + row * vocabulary + end - 1, token, mask=weight > 0)


@triton.jit
def _tile(ids_ptr, logits_ptr, largest, temperature, start, end, BLOCK: tl.constexpr):
    """Ids, keys and weights of gathered tokens. Beyond the end weights are 0."""
    at = start + tl.arange(0, BLOCK)
    mask = at < end
    ids = tl.load(ids_ptr + at, mask=mask, other=-1)
    logit = tl.load(logits_ptr + ids, mask=mask, other=float("-inf"))
    _, weight, _ = _weigh(logit, largest, temperature)
    return ids, _key(logit), weight


@triton.jit
def _find(
    counts, sums, target, ids_ptr, starts_ptr, logits_ptr, largest, temperature,
    BY_COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Where the sum of the tokens, or of their weights, in descending order of the logits, first exceeds the target,
    which the whole sum exceeds: the key of that logit, the weight of one such token, the sum before the first of them,
    the weights before it, and where its interval lies."""
    every = tl.arange(0, _INTERVALS)
    measure = counts.to(tl.int64) if BY_COUNT else sums
    interval = tl.sum((tl.cumsum(measure, axis=0) <= target).to(tl.int32), axis=0)
    interval = tl.minimum(interval, _INTERVALS - 1)
    before = tl.sum(tl.where(every < interval, measure, 0), axis=0)
    weights_before = tl.sum(tl.where(every < interval, sums, 0), axis=0)
    start = tl.load(starts_ptr + interval)
    end = start + tl.sum(tl.where(every == interval, counts, 0), axis=0)

    low = tl.full([], 0x7FFFFFFF, tl.int64)
    high = tl.full([], -0x80000000, tl.int64)
    for tile in range(start, end, BLOCK):
        _, key, weight = _tile(ids_ptr, logits_ptr, largest, temperature, tile, end, BLOCK)
        low = tl.minimum(low, tl.min(tl.where(weight > 0, key, 0x7FFFFFFF), axis=0))
        high = tl.maximum(high, tl.max(tl.where(weight > 0, key, -0x80000000), axis=0))
    high += 1
    # The sum over keys of at least low exceeds the target; over those of at least high it does not.
    while high - low > 1:
        middle = low + (high - low) // 2
        total = before
        for tile in range(start, end, BLOCK):
            _, key, weight = _tile(ids_ptr, logits_ptr, largest, temperature, tile, end, BLOCK)
            one = (weight > 0).to(tl.int64) if BY_COUNT else weight
            total += tl.sum(tl.where(key >= middle, one, 0), axis=0)
        low = tl.where(total > target, middle, low)
        high = tl.where(total > target, high, middle)

    weight_of_one = tl.full([], 0, tl.int64)
    for tile in range(start, end, BLOCK):
        _, key, weight = _tile(ids_ptr, logits_ptr, largest, temperature, tile, end, BLOCK)
        above = (key > low) & (weight > 0)
        before += tl.sum(tl.where(above, 1 if BY_COUNT else weight, 0), axis=0)
        weights_before += tl.sum(tl.where(above, weight, 0), axis=0)
        weight_of_one = tl.maximum(weight_of_one, tl.max(tl.where(key == low, weight, 0), axis=0))
    return low, weight_of_one, before, weights_before, start, end


@planned
@triton.jit
def _draw_kernel(
    out_ptr,  # [R] int64
    counts_ptr,  # [R, INTERVALS] int32
    sums_ptr,  # [R, INTERVALS] int64
    kept_ptr,  # [R] int64
    ids_ptr,  # [R, V] int32
    starts_ptr,  # [R, INTERVALS] int32
    logits_ptr,  # [R, V] float32
    largest_ptr,  # [R] float32
    settings_ptr,  # [4, R] float32
    uniforms_ptr,  # [R] float32
    vocabulary,
    logits_stride,
    settings_stride,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    ids_ptr += row * vocabulary
    starts_ptr += row * _INTERVALS

    wait_for_inputs(PDL)
    largest = tl.load(largest_ptr + row)
    temperature = tl.load(settings_ptr + row)
    top_k = tl.load(settings_ptr + settings_stride + row)
    top_p = tl.load(settings_ptr + 2 * settings_stride + row)
    kept = tl.load(kept_ptr + row)
    uniform = tl.load(uniforms_ptr + row)
    counts = tl.load(counts_ptr + row * _INTERVALS + tl.arange(0, _INTERVALS))
    sums = tl.load(sums_ptr + row * _INTERVALS + tl.arange(0, _INTERVALS))

    id = tl.full([], 0, tl.int64)
    total = tl.sum(sums, axis=0)
    if total > 0:  # else the row is not finite
        if top_k < tl.sum(counts, axis=0):
            rank = top_k.to(tl.int64) - 1
            _, one, before, weights, _, _ = _find(
                counts, sums, rank, ids_ptr, starts_ptr, logits_ptr, largest, temperature, True, BLOCK
            )
            total = weights + (rank - before + 1) * one
        if top_p < 1:
            part = tl.ceil(top_p.to(tl.float64) * total.to(tl.float64)).to(tl.int64) - 1
            _, one, _, weights, _, _ = _find(
                counts, sums, part, ids_ptr, starts_ptr, logits_ptr, largest, temperature, False, BLOCK
            )
            total = tl.minimum(total, weights + ((part - weights) // one + 1) * one)
        total = tl.minimum(total, kept)
        part = (uniform.to(tl.float64) * total.to(tl.float64)).to(tl.int64)
        drawn, one, _, weights, start, end = _find(
            counts, sums, part, ids_ptr, starts_ptr, logits_ptr, largest, temperature, False, BLOCK
        )
        place = (part - weights) // one  # among tokens of equal logits
        low = tl.full([], 0, tl.int32)
        high = vocabulary - 1
        while low < high:  # the lowest id up to which there are more than ``place`` of them
            middle = (low + high) // 2
            count = tl.full([], 0, tl.int64)
            for tile in range(start, end, BLOCK):
                ids, key, weight = _tile(ids_ptr, logits_ptr, largest, temperature, tile, end, BLOCK)
                count += tl.sum(((key == drawn) & (weight > 0) & (ids <= middle)).to(tl.int64), axis=0)
            low = tl.where(count > place, low, middle + 1)
            high = tl.where(count > place, middle, high)
        id = low.to(tl.int64)
    tl.store(out_ptr + row, id)


@tuning.remember
def _config(device: tuning.Device, rows: int, vocabulary: int) -> dict[str, Any]:
    return tuning.lookup("draw", device, {"rows": rows, "columns": vocabulary}, {"BLOCK": 1024, "num_warps": 4})


@TRITON.implements()
def draw(logits: Tensor, largest: Tensor, settings: Tensor, uniforms: Tensor) -> Tensor:
    rows, vocabulary = logits.shape
    counts = logits.new_zeros(rows, INTERVALS, dtype=torch.int32)
    sums = logits.new_zeros(rows, INTERVALS + 1, dtype=torch.int64)
    kept, sums = sums.view(-1)[-rows:], sums.view(-1)[:-rows]
    ids = logits.new_empty(rows, vocabulary, dtype=torch.int32)
    out = logits.new_empty(rows, dtype=torch.int64)
    strides, pdl = (logits.stride(0), settings.stride(0)), pdl_options(logits)
    chosen = _config(tuning.device_of(logits), rows, vocabulary)
    _sum_kernel[(rows, triton.cdiv(vocabulary, chosen["BLOCK"]))](
        counts, sums, kept, logits, largest, settings, vocabulary, *strides, **chosen, **pdl
    )
    ends = counts.cumsum(-1, dtype=torch.int32)
    _gather_kernel[(rows, triton.cdiv(vocabulary, GATHER["BLOCK"]))](
        ids, ends, logits, largest, settings, vocabulary, strides[0], **GATHER, **pdl
    )
    _draw_kernel[(rows,)](
        out, counts, sums, kept, ids, ends, logits, largest, settings, uniforms, vocabulary, *strides, **DRAW, **pdl
    )
    return out
