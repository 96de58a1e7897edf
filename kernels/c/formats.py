"""Weights and cache pages as the structs that C reads: the fields of ``weight`` and ``pages`` in calls.h, in order."""

from __future__ import annotations

from torch import Tensor

from .calls import LAYOUT

WEIGHTS, PAGES = LAYOUT.lists["WEIGHT_FORMAT"], LAYOUT.lists["PAGES_FORMAT"]
NO_WEIGHT = (None, 0, 0)
_DENSE_WEIGHT, _DENSE_PAGES = WEIGHTS.index("dense"), PAGES.index("dense")
_BYTES = 2  # of a bfloat16


def dense_weight(weight: Tensor) -> tuple[Tensor, int, int]:
    """weight [rows, columns], rows of any stride."""
    return weight, _BYTES * weight.stride(0), _DENSE_WEIGHT


def dense_pages(k_pages: Tensor, v_pages: Tensor) -> tuple[Tensor, Tensor, int, int, int]:
    """k_pages and v_pages [pages, page_size, Hkv, D], contiguous."""
    _, page_size, num_kv_heads, head_dim = k_pages.shape
    return k_pages, v_pages, page_size, _BYTES * num_kv_heads * head_dim, _DENSE_PAGES
