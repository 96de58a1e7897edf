"""Triton functions for the layout of grouped.py, for the few-token linear kernels.

The kernels multiply codes, not values: a bfloat16 holds 128 + code exactly. The scale, zero point and offset of a group
are applied once, to its sum in float32:

    out[n, t] = sum over groups of  scale[n, g] (dot(code + BASE, x) - (zero[n, g] + BASE) sum(x)) + offset[n, g] sum(x)

DEPTH values of k from one group are one matrix product. The products of a block are a batch, which the warps divide
among themselves. (If a group has 16 values, the first halves of all words come before the second halves.) The values of
k in a product are in the order in which the codes leave the packed words:

    16 values of k       0  8  4 12 | 1  9  5 13 | 2 10  6 14 | 3 11  7 15        word j holds the j-th quarter

A word has the values k and k + 8 at the same place of its two halves. So a shift and one instruction with a mask make a
pair of bfloat16, and a thread unpacks its operands of the matrix instruction from whole words.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ..language import dot, masked_or, masked_xor, subtract_bf16x2
from ..language import prefetch as into_l2
from ..triton_if_any import tl, triton


class GroupArguments(NamedTuple):
    codes: Any  # int32 [N / 16, K / 32, words, 16]
    high: Any  # int32 [N / 16, K / 32, words, 16], or None
    scales: Any  # int16 or int32, the bits of floats: [N / 16, groups, 16], or with sub_scales [N / 16, K / 256, 16]
    minima: Any  # int16, shape of scales; or None
    sub_scales: Any  # int8 or uint8 [N / 16, groups, 16], or None
    sub_minima: Any  # uint8, shape of sub_scales; or None
    zeros: Any  # uint8 [N / 16, groups, 16], or None
    places: Any  # int32 [4], the numbers 0 to 3; or None
    tiles: Any  # K / 32
    groups: Any  # groups of a row


class GroupNumbers(NamedTuple):
    """The constants of a kernel."""

    bits: int
    group: int  # values of a group
    step: int  # values of a product: the largest power of two that divides it; for float32 at most 16
    has_offset: bool
    has_sub_scales: bool
    has_zeros: bool
    zero: int  # the format's zero point, if there is no ``zeros``
    middle: int  # subtracted from codes in float16 and float32, to keep the numbers small


@triton.jit
def load(
    weight, ROWS: tl.constexpr, args, tile, start, k_end, FORM: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, SLICES: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """The packed words of a tile. A tuple in Triton cannot hold None, so in place of a tensor that the format lacks
    the tuple has another one, which nobody reads."""
    STEP: tl.constexpr = max(min(FORM.step, BLOCK_K // SLICES), 32)  # values of k of whole words
    WORDS: tl.constexpr = 8 if FORM.bits == 8 else 4
    codes = _words(weight.codes, weight.tiles, ROWS, args, tile, start, k_end, WORDS, STEP, BLOCK_N, BLOCK_K, EVEN_K)
    high = codes
    places = codes
    if weight.high is not None:
        # Loaded and not from tl.arange, because then Triton makes the operands in the registers that need them.
        places = tl.load(weight.places + tl.arange(0, 4))
        high = _words(
            weight.high, weight.tiles, ROWS, args, tile, start, k_end, FORM.bits - 4, STEP, BLOCK_N, BLOCK_K, EVEN_K
        )  # fmt: skip
    return codes, high, places


@triton.jit
def load_groups(
    weight, ROWS: tl.constexpr, args, tile, start, k_end, FORM: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, SLICES: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """The values of each tensor for the groups of a tile, [batch, BLOCK_N], with the dtype that memory has."""
    DEPTH: tl.constexpr = min(FORM.step, BLOCK_K // SLICES)
    local = tl.arange(0, BLOCK_N)
    row_tile = ROWS(args, tile, local // 16 * 16, BLOCK_N) // 16
    HALVES: tl.constexpr = max(1, 32 // DEPTH)
    member = tl.arange(0, BLOCK_K // DEPTH)
    TILES: tl.constexpr = BLOCK_K // DEPTH // HALVES
    k = (start + member % TILES * (HALVES * DEPTH) + member // TILES * DEPTH)[:, None]
    mask = None if EVEN_K else tl.broadcast_to(k < k_end, [BLOCK_K // DEPTH, BLOCK_N])
    other = None if EVEN_K else 0
    of_group = (row_tile * (weight.groups * 16))[None, :] + k // FORM.group * 16 + (local % 16)[None, :]
    of_scale = of_group
    if weight.sub_scales is not None:
        of_scale = (row_tile * (weight.tiles // 8 * 16))[None, :] + k // 256 * 16 + (local % 16)[None, :]
    scales = tl.load(weight.scales + of_scale, mask=mask, other=other)
    minima = scales
    if weight.minima is not None:
        minima = tl.load(weight.minima + of_scale, mask=mask, other=other)
    sub_scales = scales
    if weight.sub_scales is not None:
        sub_scales = tl.load(weight.sub_scales + of_group, mask=mask, other=other)
    sub_minima = scales
    if weight.sub_minima is not None:
        sub_minima = tl.load(weight.sub_minima + of_group, mask=mask, other=other)
    zeros = scales
    if weight.zeros is not None:
        zeros = tl.load(weight.zeros + of_group, mask=mask, other=other)
    return scales, minima, sub_scales, sub_minima, zeros


@triton.jit
def floats(bits):
    FLOAT: tl.constexpr = tl.float16 if bits.dtype == tl.int16 else tl.float32
    return bits.to(FLOAT, bitcast=True).to(tl.float32)


@triton.jit
def _words(
    ptr, tiles, ROWS: tl.constexpr, args, tile, start, k_end, WORDS: tl.constexpr, STEP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """Packed words [BLOCK_K / STEP, BLOCK_N, STEP / 32, WORDS]. They are loaded in the order of memory, tile row by
    tile row, so that an asynchronous copy has 16 bytes."""
    SIZE: tl.constexpr = STEP // 32 * WORDS * 16  # words of a tile row
    at = tl.arange(0, BLOCK_N // 16 * SIZE)
    row_tile = ROWS(args, tile, at // SIZE * 16, BLOCK_N) // 16
    k = (start + tl.arange(0, BLOCK_K // STEP) * STEP)[:, None]
    offset = (row_tile * (tiles * (WORDS * 16)))[None, :] + k // 32 * (WORDS * 16) + (at % SIZE)[None, :]
    mask = None if EVEN_K else tl.broadcast_to(k < k_end, [BLOCK_K // STEP, BLOCK_N // 16 * SIZE])
    words = tl.load(ptr + offset, mask=mask, other=None if EVEN_K else 0)
    words = tl.reshape(words, [BLOCK_K // STEP, BLOCK_N // 16, STEP // 32, WORDS, 16])
    return tl.reshape(tl.permute(words, [0, 1, 4, 2, 3]), [BLOCK_K // STEP, BLOCK_N, STEP // 32, WORDS])


@triton.jit
def operand(x, FORM: tl.constexpr):
    """The tokens x [SLICES, BLOCK_T, width] as the right operand of the products, [batch, DEPTH, BLOCK_T], and the sum
    of each token's values in each product, [batch, 1, BLOCK_T]."""
    SLICES: tl.constexpr = x.shape[0]
    BLOCK_T: tl.constexpr = x.shape[1]
    DEPTH: tl.constexpr = min(FORM.step, x.shape[2])
    BATCH: tl.constexpr = SLICES * (x.shape[2] // DEPTH)
    HALVES: tl.constexpr = max(1, 32 // DEPTH)
    x = tl.reshape(x, [SLICES, BLOCK_T, BATCH // SLICES // HALVES, HALVES, DEPTH // 16, 2, 2, 4])
    x = tl.reshape(tl.permute(x, [3, 0, 2, 4, 7, 6, 5, 1]), [BATCH, DEPTH, BLOCK_T])
    # The sums are a matrix product, whose order of summation does not depend on the number of tokens.
    ones = tl.full([BATCH, 16, DEPTH], 1.0, tl.float32).to(x.dtype)
    sums = tl.max(dot(ones, x, tl.zeros([BATCH, 16, BLOCK_T], tl.float32)), axis=1)
    return x, sums[:, None, :]


@triton.jit
def multiply(piece, groups, x, acc, FORM: tl.constexpr):
    """The products of a tile with x, added to acc [SLICES, BLOCK_N, BLOCK_T] float32."""
    codes, high, places = piece
    scales, minima, sub_scales, sub_minima, zeros = groups
    values, sums = x
    BATCH: tl.constexpr = values.shape[0]
    SLICES: tl.constexpr = acc.shape[0]
    BLOCK_N: tl.constexpr = acc.shape[1]
    BLOCK_T: tl.constexpr = acc.shape[2]
    BASE: tl.constexpr = -128 if FORM.bits == 8 else 128 if values.dtype == tl.bfloat16 else -FORM.middle
    if FORM.bits == 8:
        weights = _unpack_bytes(codes, values.dtype)
    else:
        weights = _unpack_nibbles(codes, high, places, values.dtype, FORM.bits, FORM.middle)
    if values.shape[1] == 16:  # the two groups of a word
        shape: tl.constexpr = [BATCH // 2, BLOCK_N, 2, 16]
        weights = tl.permute(tl.reshape(weights, shape), [2, 0, 1, 3])
    weights = tl.reshape(weights, [BATCH, BLOCK_N, values.shape[1]])
    scale = floats(scales)
    if FORM.has_sub_scales:
        scale *= sub_scales.to(tl.float32)
    if FORM.has_offset:
        offset = floats(minima)
        if FORM.has_sub_scales:
            offset *= -sub_minima.to(tl.float32)
        # The offset of a group is about its scale times the middle of the codes. The two nearly cancel, so they are
        # subtracted first.
        factor = offset - scale * (FORM.zero + BASE)
        products = dot(weights, values, tl.zeros([BATCH, BLOCK_N, BLOCK_T], tl.float32))
        products = products * scale[:, :, None] + factor[:, :, None] * sums
    else:
        if FORM.has_zeros:
            zero = zeros.to(tl.float32)[:, :, None]
            products = tl.broadcast_to(-(zero + BASE) * sums, [BATCH, BLOCK_N, BLOCK_T])
        elif FORM.zero + BASE != 0:
            products = tl.broadcast_to(sums * -(FORM.zero + BASE), [BATCH, BLOCK_N, BLOCK_T])
        else:
            products = tl.zeros([BATCH, BLOCK_N, BLOCK_T], tl.float32)
        products = dot(weights, values, products) * scale[:, :, None]
    # Each warp has whole products of the batch, so a thread already holds all numbers that it adds here.
    return acc + tl.sum(tl.reshape(products, [BATCH // SLICES, SLICES, BLOCK_N, BLOCK_T]), axis=0)


@triton.jit
def _unpack_nibbles(codes, high, places, dtype: tl.constexpr, BITS: tl.constexpr, MIDDLE: tl.constexpr):
    """Codes of up to 6 bits from words [batch, rows, K / 32, 4], in the order of ``operand``: in bfloat16 plus 128, in
    other dtypes minus MIDDLE."""
    first = tl.join(_pair(codes, high, places, 0, 0, dtype, BITS), _pair(codes, high, places, 0, 1, dtype, BITS))
    second = tl.join(_pair(codes, high, places, 1, 0, dtype, BITS), _pair(codes, high, places, 1, 1, dtype, BITS))
    # [batch, rows, tile, j, place, half] -> [batch, rows, tile, half, j, place]
    pairs = tl.permute(tl.join(first, second), [0, 1, 2, 5, 3, 4])
    return _split(pairs if dtype == tl.bfloat16 else pairs - MIDDLE * 0x00010001, dtype)


@triton.jit
def _pair(codes, high, places, HALF: tl.constexpr, PLACE: tl.constexpr, dtype: tl.constexpr, BITS: tl.constexpr):
    """The codes k = 16 HALF + 4 PLACE + j and k + 8 of each word j, in 16 bits each."""
    pair = masked_or(codes >> (8 * PLACE + 4 * HALF), 0x000F000F, 0x43004300 if dtype == tl.bfloat16 else 0)
    if BITS == 5:
        bits = high >> places[None, None, None, :]
        pair = masked_or(_right(bits, 8 * PLACE + 4 * HALF - 4), 0x00100010, pair)
    if BITS == 6:
        low, up = tl.split(high)
        bits = (up if HALF else low)[:, :, :, None] >> (2 * places)[None, None, None, :]
        pair = masked_or(_right(bits, 8 * PLACE - 4), 0x00300030, pair)
    return pair


@triton.jit
def _right(bits, PLACES: tl.constexpr):
    if PLACES < 0:
        return bits << -PLACES
    else:
        return bits >> PLACES


@triton.jit
def _unpack_bytes(codes, dtype: tl.constexpr):
    """Codes of 8 bits from words [batch, rows, K / 32, 8], in the order of ``operand``, minus 128."""
    return _split(tl.join(_byte_pair(codes, 0, dtype), _byte_pair(codes, 1, dtype)), dtype)


@triton.jit
def _byte_pair(codes, PLACE: tl.constexpr, dtype: tl.constexpr):
    pair = codes >> (8 * PLACE)
    if dtype == tl.bfloat16:
        # 128 + the low seven bits, minus 128 or 256
        return subtract_bf16x2(masked_or(pair, 0x007F007F, 0x43004300), masked_xor(pair, 0x00800080, 0x43804380))
    else:
        return (pair & 0x00FF00FF) - 0x00800080


@triton.jit
def _split(pairs, dtype: tl.constexpr):
    """Splits pairs [...] into values [..., 2]."""
    if dtype == tl.bfloat16:
        low = pairs.to(tl.int16).to(dtype, bitcast=True)
        return tl.join(low, (pairs >> 16).to(tl.int16).to(dtype, bitcast=True))
    else:
        low = (pairs << 16) >> 16
        return tl.join(low.to(dtype), ((pairs - low) >> 16).to(dtype))


@triton.jit
def prefetch(
    weight, ROWS: tl.constexpr, args, tile, k_start, k_end, FORM: tl.constexpr, BLOCK_N: tl.constexpr,
    LINES: tl.constexpr,
):  # fmt: skip
    """Prefetches the first LINES cache lines of codes of each tile of 16 rows."""
    if LINES > 0:
        WORDS: tl.constexpr = 8 if FORM.bits == 8 else 4
        row_tile = ROWS(args, tile, tl.arange(0, BLOCK_N // 16) * 16, BLOCK_N) // 16
        word = k_start // 32 * (WORDS * 16) + tl.arange(0, LINES)[None, :] * 32
        at = row_tile[:, None] * (weight.tiles * (WORDS * 16)) + word
        into_l2(weight.codes + at, (row_tile[:, None] >= 0) & (word < k_end // 32 * (WORDS * 16)))
