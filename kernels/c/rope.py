"""Rotary position embedding in C. kernels/rope.py says what each op computes; rope.c has the loops."""

from __future__ import annotations

import torch
from torch import Tensor

from ..pages import Pages
from . import build
from .backend import C
from .calls import make
from .pages import pages_struct, refuses_pages
from .recorded_calls import run
from .rows import dense_heads, team_of


def refuses_apply_rope(q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor, inverse: bool = False) -> str | None:
    return refuses_head_dim(q.shape[2])


@C.implements(refuses_apply_rope)
def apply_rope(
    q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    (num_tokens, num_q_heads, head_dim), num_kv_heads = q.shape, k.shape[1]
    q, k = dense_heads(q), dense_heads(k)
    q_out, k_out = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k))
    run(
        make.apply_rope(
            q_out=q_out,
            k_out=k_out,
            q=q,
            k=k,
            positions=positions.long().contiguous(),
            cos_sin=cos_sin,
            num_tokens=num_tokens,
            num_q_heads=num_q_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            q_stride=q.stride(0),
            k_stride=k.stride(0),
            sign=-1.0 if inverse else 1.0,
        ),
        team_of(q.numel() + k.numel()),
    )
    return q_out, k_out


def refuses_rope_and_cache(qkv: Tensor, positions: Tensor, cos_sin: Tensor, pages: Pages, slots: Tensor) -> str | None:
    return refuses_pages(pages) or refuses_head_dim(pages.shape[-1])


@C.implements(refuses_rope_and_cache)
def rope_and_cache(qkv: Tensor, positions: Tensor, cos_sin: Tensor, pages: Pages, slots: Tensor) -> Tensor:
    num_tokens, (num_kv_heads, head_dim) = len(qkv), pages.shape[-2:]
    num_q_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    q_out = qkv.new_empty(num_tokens, num_q_heads, head_dim)
    run(
        make.rope_and_cache(
            q_out=q_out,
            cache=pages_struct(pages),
            qkv=qkv,
            positions=positions.long().contiguous(),
            slots=slots.long().contiguous(),
            cos_sin=cos_sin,
            num_tokens=num_tokens,
            num_q_heads=num_q_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            qkv_stride=qkv.stride(0),
        )
    )
    return q_out


def refuses_head_dim(head_dim: int) -> str | None:
    """The reason why C does not rotate heads of this size, or None. C must be prepared."""
    limits = build.prepared().limits
    if head_dim % limits.head_dim_multiple or not 0 < head_dim <= limits.max_head_dim:
        return f"heads of {head_dim} values (a multiple of {limits.head_dim_multiple} up to {limits.max_head_dim})"
    return None
