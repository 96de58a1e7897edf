"""Norm, q, k and v, rotary embedding and cache in C: two calls. kernels/qkv_rope.py says what is computed."""

from __future__ import annotations

from torch import Tensor

from .linear import norm_linear, refuses_norm_linear
from .rope import refuses_head_dim, rope_and_cache


def refuses_norm_qkv_rope(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    cos_sin: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
) -> str | None:
    return refuses_norm_linear(x, residual, norm_weight, eps, weight, bias) or refuses_head_dim(k_pages.shape[-1])


def norm_qkv_rope(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    cos_sin: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
) -> tuple[Tensor, Tensor]:
    qkv, residual = norm_linear(x, residual, norm_weight, eps, weight, bias)
    return rope_and_cache(qkv, positions, cos_sin, k_pages, v_pages, slots), residual
