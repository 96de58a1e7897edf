"""Causal attention over keys and values in the layout of other projects, [B, Hkv, Tk, D], with the kernels of the paged
cache. Each sequence is one page, and the kernels read pages of any strides, so nothing is copied.

    out[b, i, h] = softmax(scale * q[b, h, i] . k[b, h // group, : p + 1]) v[b, h // group, : p + 1]    p = Tk - Tq + i

One query per sequence runs as decode_attention, several run as prefill_attention. Rounding and bytes moved are as those
files say.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..pages import DensePages, Pages
from .backend import TRITON
from .decode_attention import DENSE_PAGE
from .decode_attention import attend as attend_one
from .decode_attention import refuses_paged as refuses_one
from .prefill_attention import attend as attend_many
from .prefill_attention import refuses_paged as refuses_many


def _places(batch: int, queries: int, keys: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """block_tables, lengths and query_starts of ``batch`` sequences that have one page each. Each call makes new ones:
    the memory may come from another library's pool, which reuses it after the call (torch.compile's CUDA graphs do so,
    also in their warm-up run)."""
    counts = torch.arange(batch + 1, dtype=torch.int32, device=device)
    return counts[:batch, None], counts.new_full((batch,), keys), counts * queries


def _as_pages(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Pages]:
    """q as [B * Tq, Hq, D], and k and v as pages, one page a sequence."""
    return q.transpose(1, 2).flatten(0, 1), DensePages(k.transpose(1, 2), v.transpose(1, 2))


def _refuses(q: Tensor, k: Tensor, v: Tensor, scale: float) -> str | None:
    rows, pages = _as_pages(q, k, v)
    return refuses_one(rows, pages, DENSE_PAGE) if q.shape[2] == 1 else refuses_many(rows, pages, DENSE_PAGE, len(q))


@TRITON.implements(_refuses)
def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    batch, _, queries, _ = q.shape
    keys = k.shape[2]
    rows, pages = _as_pages(q, k, v)
    if queries == 1:
        out = attend_one(rows, pages, None, None, scale, keys)
    else:
        out = attend_many(rows, pages, *_places(batch, queries, keys, q.device), scale, None)
    return out.unflatten(0, (batch, queries))
