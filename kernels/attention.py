"""Causal attention over keys and values that lie as other projects keep them, [B, Hkv, Tk, D], with the kernels of the
paged cache: each sequence is one page, of any strides, so nothing is copied.

    out[b, i, h] = softmax(scale * q[b, h, i] . k[b, h // group, : p + 1]) v[b, h // group, : p + 1]    p = Tk - Tq + i

One query a sequence runs as decode_attention, several as prefill_attention; what those files say holds here.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import reference
from .checks import check_device, check_tensor
from .decode_attention import attend as attend_one
from .decode_attention import unsupported as unsupported_one
from .dispatch import op, runs_on_triton
from .prefill_attention import attend as attend_many
from .prefill_attention import unsupported as unsupported_many
from .triton_if_any import triton

PAGE = 64  # what a page's length is rounded up to; the kernels never look beyond a sequence's own


def _places(batch: int, queries: int, keys: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """block_tables, lengths and query_starts of sequences that are one page each."""
    tables = torch.arange(batch, dtype=torch.int32, device=device)[:, None]
    lengths = torch.full((batch,), keys, dtype=torch.int32, device=device)
    return tables, lengths, torch.arange(batch + 1, dtype=torch.int32, device=device) * queries


_kept_places = functools.lru_cache(maxsize=64)(_places)  # every layer of a model asks for the same ones


def _fake_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    batch, heads, queries, dim = q.shape
    return q.new_empty(batch, queries, heads, dim)


@op(fake=_fake_attention)
def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention (Dao 2023, arXiv:2307.08691) of the last Tq tokens of B sequences of one length.

    q [B, Hq, Tq, D]; k and v [B, Hkv, Tk, D] of q's dtype, Tk at least Tq, Hq a multiple of Hkv; any strides, but the
    last dimension contiguous. The last query sees all keys. Returns [B, Tq, Hq, D]. Has no gradient."""
    check_tensor("attention", "q", q, ("B", "Hq", "Tq", "D"))
    batch, heads, queries, dim = q.shape
    check_tensor("attention", "k", k, (batch, "Hkv", "Tk", dim), like=q)
    check_tensor("attention", "v", v, tuple(k.shape), like=q)
    check_device("attention", q=q, k=k, v=v)
    kv_heads, keys = k.shape[1:3]
    if heads % kv_heads:
        raise ValueError(f"attention: q's {heads} heads must be a multiple of k's {kv_heads}")
    if keys < queries:
        raise ValueError(f"attention: k has {keys} tokens, fewer than q's {queries}")
    rows = q.transpose(1, 2).flatten(0, 1)
    k_pages, v_pages = k.transpose(1, 2), v.transpose(1, 2)
    unsupported = unsupported_one if queries == 1 else unsupported_many
    if not runs_on_triton(q, unsupported(rows, k_pages, PAGE)):
        return reference.attention(q, k, v, scale)
    capturing = q.is_cuda and torch.cuda.is_current_stream_capturing()
    tables, lengths, starts = (_places if capturing else _kept_places)(batch, queries, keys, q.device)
    page_size = triton.cdiv(keys, PAGE) * PAGE
    if queries == 1:
        out = attend_one(rows, k_pages, v_pages, tables, lengths, scale, page_size)
    else:
        out = attend_many(rows, k_pages, v_pages, tables, lengths, starts, scale, page_size)
    return out.unflatten(0, (batch, queries))
