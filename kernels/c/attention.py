"""Attention over the paged cache in C. kernels/attention.py says what each op computes. attention.h,
decode_attention.c and prefill_attention.c have the pictures."""

from __future__ import annotations

import torch
from torch import Tensor

from ..pages import Pages
from . import build
from .backend import C
from .calls import make
from .limits import decode_scratch, decode_splits, prefill_scratch
from .pages import pages_struct, refuses_pages
from .recorded_calls import run, scratch
from .rope import refuses_head_dim
from .rows import dense_heads


def refuses_decode_attention(
    q: Tensor, pages: Pages, block_tables: Tensor, lengths: Tensor, scale: float
) -> str | None:
    return _refuses(q, pages)


@C.implements(refuses_decode_attention)
def decode_attention(q: Tensor, pages: Pages, block_tables: Tensor, lengths: Tensor, scale: float) -> Tensor:
    q = dense_heads(q)
    (num_sequences, num_q_heads, head_dim), (_, page_size, num_kv_heads, _) = q.shape, pages.shape
    splits = decode_splits(build.prepared().limits, block_tables.shape[1] * page_size)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    block_tables, lengths = (t.int().contiguous() for t in (block_tables, lengths))
    run(
        make.decode_attention(
            out=out,
            scratch=scratch(decode_scratch(num_sequences, num_q_heads, splits, head_dim)),
            q=q,
            cache=pages_struct(pages),
            block_tables=block_tables,
            lengths=lengths,
            num_sequences=num_sequences,
            num_kv_heads=num_kv_heads,
            group=num_q_heads // num_kv_heads,
            head_dim=head_dim,
            q_stride=q.stride(0),
            block_table_stride=block_tables.stride(0),
            splits=splits,
            scale=scale,
        )
    )
    return out


def refuses_prefill_attention(
    q: Tensor,
    pages: Pages,
    block_tables: Tensor,
    lengths: Tensor,
    query_starts: Tensor,
    scale: float,
) -> str | None:
    if reason := _refuses(q, pages):
        return reason
    return None if build.prepared().multiplies else "several tokens a sequence, which torch multiplies faster here"


@C.implements(refuses_prefill_attention)
def prefill_attention(
    q: Tensor,
    pages: Pages,
    block_tables: Tensor,
    lengths: Tensor,
    query_starts: Tensor,
    scale: float,
) -> Tensor:
    q = dense_heads(q)
    (_, num_q_heads, head_dim), num_kv_heads = q.shape, pages.shape[2]
    size = prefill_scratch(build.prepared().limits, lengths.tolist(), num_kv_heads, head_dim)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    block_tables, lengths, query_starts = (t.int().contiguous() for t in (block_tables, lengths, query_starts))
    run(
        make.prefill_attention(
            out=out,
            scratch=scratch(size),
            q=q,
            cache=pages_struct(pages),
            block_tables=block_tables,
            lengths=lengths,
            query_starts=query_starts,
            num_sequences=len(lengths),
            num_kv_heads=num_kv_heads,
            group=num_q_heads // num_kv_heads,
            head_dim=head_dim,
            q_stride=q.stride(0),
            block_table_stride=block_tables.stride(0),
            scale=scale,
        )
    )
    return out


def _refuses(q: Tensor, pages: Pages) -> str | None:
    """The reason why C does not run attention of q [.., Hq, D] over these pages, or None."""
    if reason := refuses_pages(pages) or refuses_head_dim(pages.shape[-1]):
        return reason
    group, most = q.shape[1] // pages.shape[-2], build.prepared().limits.max_group
    return f"{group} query heads for each of the cache's (at most {most})" if group > most else None
