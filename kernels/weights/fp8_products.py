"""Triton functions for fp8 weights (fp8.py): for the few-token linear kernels, and to dequantise rows.

e4m3 has four exponent bits and three mantissa bits; bfloat16 has eight and seven. At their places in bfloat16, the bits
of an e4m3 number stand for the number times 2 ** -120, because the biases of the exponents are 7 and 127. This is also
true of subnormal numbers. So a multiplication by 2 ** 120 gives the exact number:

    e4m3                    s eeee mmm
    bfloat16         s 0000 eeee mmm 0000

Four codes are loaded as one word, and two of them are converted at a time. The values of k in a product are in the
order in which the codes leave the words, so that a thread unpacks its operands of the matrix instruction from whole
words:

    values of k          0 2 1 3 | 4 6 5 7 | ...

The scale of a row is applied to float32 sums.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ..language import block_of, dot, masked_else, scaled_bf16x2
from ..language import prefetch as into_l2
from ..triton_if_any import tl, triton

NAN = tl.constexpr(0x7F)  # the code, without its sign


class Fp8Arguments(NamedTuple):
    codes: Any  # [N, K] uint8
    scales: Any  # [N] int32, the bits of float32
    stride: Any  # bytes between rows


class Fp8Numbers(NamedTuple):
    """The constants of a kernel, named as in group_products.py: the linear kernels and tiling.py read them."""

    has_sub_scales: bool = False
    has_offset: bool = False
    step: int = 32


@triton.jit
def load(
    weight, ROWS: tl.constexpr, args, tile, start, k_end, FORM: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, SLICES: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """Words of four codes, [SLICES, BLOCK_N, BLOCK_K / SLICES / 4]."""
    rows = ROWS(args, tile, tl.arange(0, BLOCK_N), BLOCK_N)[None, :, None]
    k = start // 4 + block_of(BLOCK_K // 4, SLICES)
    mask = None if EVEN_K else k < k_end // 4
    words = weight.codes.to(tl.pointer_type(tl.int32), bitcast=True)
    return tl.load(words + rows * (weight.stride // 4) + k, mask=mask, other=None if EVEN_K else 0)


@triton.jit
def load_groups(
    weight, ROWS: tl.constexpr, args, tile, start, k_end, FORM: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, SLICES: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """The scales of the rows, [BLOCK_N]."""
    rows = ROWS(args, tile, tl.arange(0, BLOCK_N), BLOCK_N)
    return tl.load(weight.scales + rows).to(tl.float32, bitcast=True)


@triton.jit
def operand(x, FORM: tl.constexpr):
    """The tokens x [SLICES, BLOCK_T, width] as the right operand of the products, [SLICES, width, BLOCK_T]."""
    x = tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2] // 4, 2, 2])
    return tl.reshape(tl.permute(x, [0, 2, 4, 3, 1]), [x.shape[0], x.shape[2] * 4, x.shape[1]])


@triton.jit
def multiply(piece, groups, x, acc, FORM: tl.constexpr):
    weights = _unpack(piece, x.dtype)
    if x.dtype == tl.float32:
        # The error grows with the number of products that are added one after another. So 32 are added at a time, and
        # then these sums.
        SLICES: tl.constexpr = acc.shape[0]
        PARTS: tl.constexpr = x.shape[1] // 32
        weights = tl.permute(tl.reshape(weights, [SLICES, acc.shape[1], PARTS, 32]), [0, 2, 1, 3])
        weights = tl.reshape(weights, [SLICES * PARTS, acc.shape[1], 32])
        zeros = tl.zeros([SLICES * PARTS, acc.shape[1], acc.shape[2]], tl.float32)
        parts = dot(weights, tl.reshape(x, [SLICES * PARTS, 32, acc.shape[2]]), zeros)
        products = tl.sum(tl.reshape(parts, [SLICES, PARTS, acc.shape[1], acc.shape[2]]), axis=1)
    else:
        products = dot(weights, x, tl.zeros(acc.shape, tl.float32))
    return acc + products * groups[None, :, None]


@triton.jit
def _unpack(words, dtype: tl.constexpr):
    """The numbers [slices, rows, width] of words [slices, rows, width / 4], in the order of ``operand``."""
    if dtype == tl.bfloat16:
        signs = words & -0x7F7F7F80  # 0x80808080
        even = scaled_bf16x2(masked_else(words << 4, 0x07F007F0, signs << 8), 0x7B807B80)
        odd = scaled_bf16x2(masked_else(words >> 4, 0x07F007F0, signs), 0x7B807B80)
        pairs = tl.join(even, odd)  # [slices, rows, width / 4, place]
        low = pairs.to(tl.int16).to(dtype, bitcast=True)
        numbers = tl.join(low, (pairs >> 16).to(tl.int16).to(dtype, bitcast=True))
    else:
        first = tl.join(_number(words), _number(words >> 16))
        second = tl.join(_number(words >> 8), _number(words >> 24))
        # [slices, rows, width / 4, half, place] -> [slices, rows, width / 4, place, half]
        numbers = tl.permute(tl.join(first, second), [0, 1, 2, 4, 3]).to(dtype)
    return tl.reshape(numbers, [words.shape[0], words.shape[1], words.shape[2] * 4])


@triton.jit
def _number(codes):
    """The numbers of the lowest bytes, in float32."""
    return (((codes & 0x80) << 24) | ((codes & 0x7F) << 20)).to(tl.float32, bitcast=True) * 1.329227995784916e36


@triton.jit
def prefetch(
    weight, ROWS: tl.constexpr, args, tile, k_start, k_end, FORM: tl.constexpr, BLOCK_N: tl.constexpr,
    LINES: tl.constexpr,
):  # fmt: skip
    if LINES > 0:
        rows = ROWS(args, tile, tl.arange(0, BLOCK_N), BLOCK_N)
        k = k_start + tl.arange(0, LINES)[None, :] * 128
        into_l2(weight.codes + rows[:, None] * weight.stride + k, (rows[:, None] >= 0) & (k < k_end))


@triton.jit
def dequantise(weight, rows, start, k_size, FORM: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr):
    """See ``triton_dequantise`` of Weight."""
    k = start + tl.arange(0, BLOCK_K)[None, :]
    mask = None if EVEN_K else tl.broadcast_to(k < k_size, [rows.shape[0], BLOCK_K])
    codes = tl.load(weight.codes + rows[:, None] * weight.stride + k, mask=mask, other=None if EVEN_K else 0)
    codes = codes.to(tl.int32)
    numbers = tl.where((codes & NAN) == NAN, float("nan"), _number(codes))
    return numbers * tl.load(weight.scales + rows).to(tl.float32, bitcast=True)[:, None]
