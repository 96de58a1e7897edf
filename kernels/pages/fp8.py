"""Keys and values in e4m3 (8-bit floating point, OCP), with a scale for each token and head (scaled.py).

    bits of a code     s eeee mmm      (-1)**s * 2**(e - 7) * (1 + m / 8), or 2**-6 * m / 8 where e is 0

The kernels convert with integer operations, so they also run on GPUs without e4m3: with the bits of a code at their
places in a float16, the float16 is 2 ** -8 of the code's value. (With a float32 in place of the float16, decode
attention spilled registers on an H100.) The channels of int8.py would not help, because rounding errors are relative to
each value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..language import cast
from ..triton_if_any import tl, triton
from . import dense
from .scaled import ScaledPages, store_heads, values_of_v

_UNIT = tl.constexpr(2.0**8)  # the bias of float16's exponent is larger by 8


@triton.jit
def _values(codes):
    codes = codes.to(tl.int16)
    return (((codes & 0x80) << 8) | ((codes & 0x7F) << 7)).to(tl.float16, bitcast=True).to(tl.float32) * _UNIT


@triton.jit
def _load_k(pages, kv_head, page, token, column, mask):
    return cast(_values(dense._load_k(pages, kv_head, page, token, column, mask)), pages.like.dtype.element_ty)


@triton.jit
def _load_v(pages, kv_head, page, token, column, mask):
    v = _values(dense._load_v(pages, kv_head, page, token, column, mask))
    return values_of_v(v, pages.like.dtype.element_ty)


@triton.jit
def _codes(x):
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    size = tl.abs(x)
    small = (size + 16384.0).to(tl.int32, bitcast=True) & 0xF  # multiples of 2 ** -9, as far apart as floats at 16384
    bits = size.to(tl.int32, bitcast=True)
    bits = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    return (tl.where(size < 0.015625, small, bits) | sign).to(tl.uint8)


@triton.jit
def _store_k(pages, slot, kv_head, num_kv_heads, column, low, high, mask, HEAD_DIM: tl.constexpr):
    store_heads(pages.k, pages.k_scales, slot, kv_head, num_kv_heads, column, low, high, mask, _codes, 448.0, HEAD_DIM)


@triton.jit
def _store_v(pages, slot, kv_head, num_kv_heads, column, low, high, mask, HEAD_DIM: tl.constexpr):
    store_heads(pages.v, pages.v_scales, slot, kv_head, num_kv_heads, column, low, high, mask, _codes, 448.0, HEAD_DIM)


class Fp8Pages(ScaledPages):
    """The tensors of ScaledPages. The last one is empty."""

    format = "fp8"
    names = ("k_pages", "v_pages", "k_scales", "v_scales", "like")
    code, largest = torch.uint8, 448.0
    triton_most_keys = 32
    triton_load_k, triton_load_v = _load_k, _load_v
    triton_store_k, triton_store_v = _store_k, _store_v
    __slots__ = ()

    @staticmethod
    def _encode(x: Tensor) -> Tensor:
        return x.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).view(torch.uint8)

    @staticmethod
    def _decode(codes: Tensor, dtype: torch.dtype) -> Tensor:
        return codes.contiguous().view(torch.float8_e4m3fn).to(dtype)
