"""The dense format: keys and values as the model computed them, in q's dtype."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..language import prefetch
from ..triton_if_any import tl, triton
from .tokens import TokenPages


class DensePagesArguments(NamedTuple):
    k: Any  # [num_pages, page_size, Hkv, D]
    k_page_stride: Any
    k_token_stride: Any
    k_head_stride: Any
    v: Any  # [num_pages, page_size, Hkv, D]
    v_page_stride: Any  # None (as the next two) if equal to k's: the compiler then computes the offsets of both once
    v_token_stride: Any
    v_head_stride: Any


@triton.jit
def _v_strides(pages):
    if pages.v_page_stride is None:
        return pages.k_page_stride, pages.k_token_stride, pages.k_head_stride
    else:
        return pages.v_page_stride, pages.v_token_stride, pages.v_head_stride


@triton.jit
def _load_k(pages, kv_head, page, token, column, mask):
    head = pages.k + kv_head.to(tl.int64) * pages.k_head_stride
    at = token * pages.k_token_stride + column  # without the page, so it is the same in each iteration over pages
    return tl.load(head + page * pages.k_page_stride + at, mask=mask, other=None if mask is None else 0.0)


@triton.jit
def _load_v(pages, kv_head, page, token, column, mask):
    page_stride, token_stride, head_stride = _v_strides(pages)
    head = pages.v + kv_head.to(tl.int64) * head_stride
    at = token * token_stride + column
    return tl.load(head + page * page_stride + at, mask=mask, other=None if mask is None else 0.0)


@triton.jit
def _prefetch(pages, kv_head, page, token, mask, HEAD_DIM: tl.constexpr):
    line: tl.constexpr = 1024 // pages.k.dtype.element_ty.primitive_bitwidth  # elements in a cache line of 128 bytes
    column = (tl.arange(0, max(1, HEAD_DIM // line)) * line)[None, :]
    page_stride, token_stride, head_stride = _v_strides(pages)
    k = pages.k + kv_head.to(tl.int64) * pages.k_head_stride + page * pages.k_page_stride
    v = pages.v + kv_head.to(tl.int64) * head_stride + page * page_stride
    everywhere = mask & (column >= 0)
    prefetch(k + token * pages.k_token_stride + column, everywhere)
    prefetch(v + token * token_stride + column, everywhere)


@triton.jit
def _store_k(pages, slot, kv_head, num_kv_heads, column, low, high, mask, HEAD_DIM: tl.constexpr):
    to = pages.k + (slot * num_kv_heads + kv_head) * HEAD_DIM + column
    tl.store(to, low, mask=mask)
    tl.store(to + HEAD_DIM // 2, high, mask=mask)


@triton.jit
def _store_v(pages, slot, kv_head, num_kv_heads, column, low, high, mask, HEAD_DIM: tl.constexpr):
    to = pages.v + (slot * num_kv_heads + kv_head) * HEAD_DIM + column
    tl.store(to, low, mask=mask)
    tl.store(to + HEAD_DIM // 2, high, mask=mask)


class DensePages(TokenPages):
    """Two tensors [num_pages, page_size, Hkv, D]. Attention reads them with any strides, if the last dimension is
    contiguous. Storing requires dense tensors."""

    format = "dense"
    names = ("k_pages", "v_pages")
    triton_load_k, triton_load_v = _load_k, _load_v
    triton_store_k, triton_store_v = _store_k, _store_v
    triton_prefetch = _prefetch
    __slots__ = ("k", "v")

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.k, self.v = k, v

    @classmethod
    def _others(cls, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        return ()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.k, self.v

    def _check_others(self, op: str, like: Tensor) -> None:
        pass

    def store(self, slots: Tensor, k: Tensor, v: Tensor) -> None:
        self._write(slots, (k, v))

    def gather(self, block_table: Tensor, length: int) -> tuple[Tensor, Tensor]:
        k, v = self._rows(block_table, length)
        return k, v

    def triton_arguments(self) -> DensePagesArguments:
        k_strides, v_strides = self.k.stride()[:3], self.v.stride()[:3]
        own = (None, None, None) if v_strides == k_strides else v_strides
        return DensePagesArguments(self.k, *k_strides, self.v, *own)  # type: ignore[call-arg] # of 3 each
