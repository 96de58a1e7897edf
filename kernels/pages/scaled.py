"""Keys and values in one byte, with a scale for each token and head. int8.py and fp8.py are the formats.

    k[t, h, d] = code(k_pages[t, h, d]) * k_scales[t, h]       and v likewise
    scale      = (largest absolute value of the head) / LARGEST

A head with a NaN or an infinity is stored as NaN throughout, so that the model reports it. A head whose values are all
below 2 ** -100 is stored as zero.

Attention multiplies scores by the scales of k, and softmax weights by the scales of v. That is one product where the D
codes of a head would take D.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..checks import check_tensor, wide
from ..triton_if_any import tl, triton
from . import dense
from .tokens import TokenPages

SMALLEST = 2.0**-100
UNIT = tl.constexpr(128.0)  # keeps a softmax weight times a scale from becoming subnormal in float16
_BITS_OF_SMALLEST = tl.constexpr(27 << 23)
_BITS_OF_INFINITY = tl.constexpr(0x7F800000)


class ScaledPagesArguments(NamedTuple):
    k: Any  # [num_pages, page_size, Hkv, D], and its strides
    k_page_stride: Any
    k_token_stride: Any
    k_head_stride: Any
    v: Any  # likewise, with the strides of k
    k_scales: Any  # [num_pages, page_size, Hkv] float32
    v_scales: Any
    scales_page_stride: Any
    scales_token_stride: Any
    like: Any  # of q's dtype; the format decides what it holds
    v_page_stride: Any = None


@triton.jit
def scale_k(pages, kv_head, page, token, mask):
    at = page * pages.scales_page_stride + token * pages.scales_token_stride + kv_head
    return tl.load(pages.k_scales + at, mask=mask, other=None if mask is None else 0.0)


@triton.jit
def scale_v(pages, kv_head, page, token, mask):
    at = page * pages.scales_page_stride + token * pages.scales_token_stride + kv_head
    scale = tl.load(pages.v_scales + at, mask=mask, other=None if mask is None else 0.0)
    return scale * UNIT if pages.like.dtype.element_ty == tl.float16 else scale


@triton.jit
def values_of_v(v, dtype: tl.constexpr):
    """Decoded codes of v, in float32, as a tile in q's dtype."""
    return (v / UNIT if dtype == tl.float16 else v).to(dtype)


@triton.jit
def store_heads(
    codes,  # [num_pages, page_size, Hkv, D]
    scales,  # [num_pages, page_size, Hkv]
    slot,
    kv_head,  # [heads, 1]
    num_kv_heads,
    column,  # [heads, D / 2]
    low,  # [heads, D / 2]
    high,
    mask,  # [heads, 1]
    ENCODE: tl.constexpr,  # from values of at most LARGEST to codes
    LARGEST: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    head = slot * num_kv_heads + kv_head
    low, high = low.to(tl.float32), high.to(tl.float32)
    # Compared as integers, the bits of infinity and NaN are the largest.
    of_low, of_high = low.to(tl.int32, bitcast=True) & 0x7FFFFFFF, high.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    bits = tl.max(tl.maximum(of_low, of_high), axis=1)[:, None]
    finite, counts = bits < _BITS_OF_INFINITY, bits >= _BITS_OF_SMALLEST
    most = tl.where(counts, bits, _BITS_OF_SMALLEST).to(tl.float32, bitcast=True)
    largest = tl.full(most.shape, LARGEST, tl.float32)
    inverse = tl.where(counts, tl.div_rn(largest, most), 0.0)
    scale = tl.where(finite, tl.where(counts, tl.div_rn(most, largest), 0.0), float("nan"))
    to = codes + head * HEAD_DIM + column
    tl.store(to, ENCODE(tl.where(finite, low, 0.0) * inverse), mask=mask)
    tl.store(to + HEAD_DIM // 2, ENCODE(tl.where(finite, high, 0.0) * inverse), mask=mask)
    tl.store(scales + head, scale, mask=mask)


class ScaledPages(TokenPages, is_format=False):
    """Codes [num_pages, page_size, Hkv, D] of k and of v, their scales [num_pages, page_size, Hkv] in float32, and a
    tensor of q's dtype. A subclass is a format: it says what a code is."""

    __slots__ = ("k", "k_scales", "like", "v", "v_scales")
    by_token = 4
    largest: ClassVar[float]  # of the codes
    triton_scale_k, triton_scale_v = scale_k, scale_v
    triton_prefetch = dense._prefetch
    triton_whole_heads = True

    def __init__(self, k: Tensor, v: Tensor, k_scales: Tensor, v_scales: Tensor, like: Tensor) -> None:
        self.k, self.v, self.k_scales, self.v_scales, self.like = k, v, k_scales, v_scales, like

    @classmethod
    def _others(cls, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        k_scales, v_scales = (torch.empty(shape[:3], dtype=torch.float32, device=device) for _ in range(2))
        return k_scales, v_scales, cls._like(shape, dtype, device)

    @classmethod
    def _like(cls, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(0, dtype=dtype, device=device)

    def _like_shape(self) -> tuple[int, ...]:
        return (0,)

    @staticmethod
    def _encode(x: Tensor) -> Tensor:
        """The codes of values from -largest to largest."""
        raise NotImplementedError

    @staticmethod
    def _decode(codes: Tensor, dtype: torch.dtype) -> Tensor:
        return codes.to(dtype)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.k, self.v, self.k_scales, self.v_scales, self.like

    def _check_others(self, op: str, like: Tensor) -> None:
        floats = (torch.float32, torch.float64)  # float64 in comparisons only
        check_tensor(op, self.names[2], self.k_scales, tuple(self.k.shape[:3]), dtypes=floats, dense=True)
        check_tensor(op, self.names[3], self.v_scales, tuple(self.k.shape[:3]), dtypes=floats, dense=True)
        check_tensor(op, self.names[4], self.like, self._like_shape(), like=like, dense=True)

    def store(self, slots: Tensor, k: Tensor, v: Tensor) -> None:
        (k, k_scales), (v, v_scales) = self._encoded(k), self._encoded(v)
        self._write(slots, (k, v, k_scales, v_scales))

    def _encoded(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The codes of values [T, Hkv, D], and their scales."""
        values = wide(values)
        most = values.abs().amax(-1)
        finite, counts = most.isfinite(), most >= SMALLEST
        largest = torch.full_like(most, self.largest)  # a tensor: torch multiplies by the reciprocal of a Python number
        scales = torch.where(counts, most / largest, 0.0)
        inverse = torch.where(finite & counts, largest / most, 0.0)[..., None]
        codes = self._encode(torch.where(finite[..., None], values, 0.0) * inverse)
        return codes, torch.where(finite, scales, math.nan).to(self.k_scales.dtype)

    def gather(self, block_table: Tensor, length: int) -> tuple[Tensor, Tensor]:
        k, v = self._gathered(block_table, length)
        return k.to(self.dtype), v.to(self.dtype)

    def _gathered(self, block_table: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """k and v [Hkv, length, D] in the dtype of the scales."""
        k, v, k_scales, v_scales = self._rows(block_table, length)
        dtype = k_scales.dtype
        return self._decode(k, dtype) * k_scales[..., None], self._decode(v, dtype) * v_scales[..., None]

    def triton_arguments(self) -> ScaledPagesArguments:
        page, token, head = self.k.stride()[:3]
        scales_page, scales_token = self.k_scales.stride()[:2]
        scales = self.k_scales, self.v_scales, scales_page, scales_token
        return ScaledPagesArguments(self.k, page, token, head, self.v, *scales, self.like)
