"""norm_qkv_rope on a CPU: it runs norm_linear, then rope_and_cache."""

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
    norm_weight: Tensor,
    eps: float,
    weight: Weight,
    bias: Tensor | None,
    positions: Tensor,
    cos_sin: Tensor,
    pages: Pages,
    slots: Tensor,
) -> Tensor:
    """Calls the public ops, because C may refuse one of the two; torch then runs that one."""
    qkv = norm_linear(x, norm_weight, eps, weight, bias)
    return rope_and_cache(qkv, positions, cos_sin, pages, slots)
