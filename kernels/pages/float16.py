"""Keys and values in float16, whatever q's dtype is.

float16 takes half the memory of float32 and is more exact than bfloat16: the relative rounding error is up to 2 ** -11,
not 2 ** -8. Finite values beyond 65,504 are stored as 65,504 with their sign; infinities and NaN stay as they are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import wide
from ..language import cast
from ..triton_if_any import tl, triton
from . import dense
from .tokens import TokenPages

LARGEST = 65504.0
_BITS_OF_LARGEST = tl.constexpr(0x477FE000)
_BITS_OF_INFINITY = tl.constexpr(0x7F800000)


class Float16PagesArguments(NamedTuple):
    k: Any  # [num_pages, page_size, Hkv, D] int16, and its strides
    k_page_stride: Any
    k_token_stride: Any
    k_head_stride: Any
    v: Any  # likewise, with the strides of k
    like: Any  # of q's dtype
    v_page_stride: Any = None


@triton.jit
def _floats(bits, dtype: tl.constexpr):
    return cast(bits.to(tl.float16, bitcast=True).to(tl.float32), dtype)


@triton.jit
def _bits(x):
    bits = x.to(tl.float32).to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    too_large = (size > _BITS_OF_LARGEST) & (size < _BITS_OF_INFINITY)
    bits = tl.where(too_large, (bits & -0x80000000) | _BITS_OF_LARGEST, bits)
    return bits.to(tl.float32, bitcast=True).to(tl.float16).to(tl.int16, bitcast=True)


@triton.jit
def _load_k(pages, kv_head, page, token, column, mask):
    return _floats(dense._load_k(pages, kv_head, page, token, column, mask), pages.like.dtype.element_ty)


@triton.jit
def _load_v(pages, kv_head, page, token, column, mask):
    return _floats(dense._load_v(pages, kv_head, page, token, column, mask), pages.like.dtype.element_ty)


@triton.jit
def _store_k(pages, slot, kv_head, num_kv_heads, column, low, high, mask, HEAD_DIM: tl.constexpr):
    dense._store_k(pages, slot, kv_head, num_kv_heads, column, _bits(low), _bits(high), mask, HEAD_DIM)


@triton.jit
def _store_v(pages, slot, kv_head, num_kv_heads, column, low, high, mask, HEAD_DIM: tl.constexpr):
    dense._store_v(pages, slot, kv_head, num_kv_heads, column, _bits(low), _bits(high), mask, HEAD_DIM)


class Float16Pages(TokenPages):
    """Two tensors [num_pages, page_size, Hkv, D] of int16, the bits of float16, and an empty one of q's dtype."""

    format = "float16"
    names = ("k_pages", "v_pages", "like")
    code = torch.int16
    triton_load_k, triton_load_v = _load_k, _load_v
    triton_store_k, triton_store_v = _store_k, _store_v
    triton_prefetch = dense._prefetch
    __slots__ = ("k", "like", "v")

    def __init__(self, k: Tensor, v: Tensor, like: Tensor) -> None:
        self.k, self.v, self.like = k, v, like

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.k, self.v, self.like

    def store(self, slots: Tensor, k: Tensor, v: Tensor) -> None:
        self._write(slots, [_stored(each) for each in (k, v)])

    def gather(self, block_table: Tensor, length: int) -> tuple[Tensor, Tensor]:
        k, v = (each.view(torch.float16).to(self.dtype) for each in self._rows(block_table, length))
        return k, v

    def triton_arguments(self) -> Float16PagesArguments:
        page, token, head = self.k.stride()[:3]
        return Float16PagesArguments(self.k, page, token, head, self.v, self.like)


def _stored(values: Tensor) -> Tensor:
    """The bits of values in float16."""
    return torch.where(values.isfinite(), wide(values).clamp(-LARGEST, LARGEST), values).half().view(torch.int16)
