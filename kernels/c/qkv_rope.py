"""Norm, q, k and v, rotary embedding and cache, as the two ops that they are made of."""

from __future__ import annotations

from torch import Tensor

from ..linear import norm_linear
from ..pages import Pages
from ..rope import rope_and_cache
from ..weights import Weight
from .backend import C


@C.implements()
def norm_qkv_rope(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    weight: Weight,
    bias: Tensor | None,
    positions: Tensor,
    cos_sin: Tensor,
    pages: Pages,
    slots: Tensor,
) -> tuple[Tensor, Tensor]:
    """C may take one of the two and leave the other to torch."""
    qkv, residual = norm_linear(x, residual, norm_weight, eps, weight, bias)
    return rope_and_cache(qkv, positions, cos_sin, pages, slots), residual
