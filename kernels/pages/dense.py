"""The dense format: keys and values as the model computed them, in q's dtype."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import check_device, check_tensor
from ..language import prefetch
from ..triton_if_any import tl, triton
from .base import Pages


class DensePagesArguments(NamedTuple):
    k: Any  # [num_pages, page_size, Hkv, D]
    k_page_stride: Any
    k_token_stride: Any
    k_head_stride: Any
    v: Any  # [num_pages, page_size, Hkv, D]
    v_page_stride: Any  # None, like the next two: those of k. The compiler then computes the offsets of both once.
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
    at = token * pages.k_token_stride + column  # apart from the page: the same in each turn of a loop over pages
    return tl.load(head + page * pages.k_page_stride + at, mask=mask, other=None if mask is None else 0.0)


@triton.jit
def _load_v(pages, kv_head, page, token, column, mask):
    page_stride, token_stride, head_stride = _v_strides(pages)
    head = pages.v + kv_head.to(tl.int64) * head_stride
    at = token * token_stride + column
    return tl.load(head + page * page_stride + at, mask=mask, other=None if mask is None else 0.0)


@triton.jit
def _prefetch(pages, kv_head, page, token, mask, HEAD_DIM: tl.constexpr):
    line: tl.constexpr = 1024 // pages.k.dtype.element_ty.primitive_bitwidth  # elements of 128 bytes
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


class DensePages(Pages):
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
    def allocate(
        cls, num_pages: int, page_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> DensePages:
        k, v = (torch.empty(num_pages, page_size, num_kv_heads, head_dim, dtype=dtype, device=device) for _ in range(2))
        return cls(k, v)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.k, self.v

    @property
    def shape(self) -> tuple[int, int, int, int]:
        num_pages, page_size, num_kv_heads, head_dim = self.k.shape
        return num_pages, page_size, num_kv_heads, head_dim

    @property
    def dtype(self) -> torch.dtype:
        return self.k.dtype

    def check(self, op: str, like: Tensor, head_dim: int | str) -> None:
        check_tensor(op, "k_pages", self.k, ("pages", "page size", "Hkv", head_dim), like=like, dense=True)
        check_tensor(op, "v_pages", self.v, tuple(self.k.shape), like=like, dense=True)
        check_device(op, k_pages=self.k, v_pages=self.v)

    def store(self, slots: Tensor, k: Tensor, v: Tensor) -> None:
        num_kv_heads, head_dim = self.k.shape[-2:]
        self.k.view(-1, num_kv_heads, head_dim)[slots] = k
        self.v.view(-1, num_kv_heads, head_dim)[slots] = v

    def gather(self, block_table: Tensor, length: int) -> tuple[Tensor, Tensor]:
        numbers = block_table[: -(-length // self.k.shape[1])].long()
        k, v = (paged[numbers].flatten(0, 1)[:length].transpose(0, 1) for paged in (self.k, self.v))
        return k, v

    def copy_page(self, to: int, source: int) -> None:
        self.k[to] = self.k[source]
        self.v[to] = self.v[source]

    def triton_arguments(self) -> DensePagesArguments:
        k_strides, v_strides = self.k.stride()[:3], self.v.stride()[:3]
        own = (None, None, None) if v_strides == k_strides else v_strides
        return DensePagesArguments(self.k, *k_strides, self.v, *own)  # type: ignore[call-arg] # of 3 each
