"""The last norm and the product with the vocabulary in C, and the largest logits. kernels/lm_head.py says what is
computed."""

from __future__ import annotations

import torch
from torch import Tensor

from ..recording import is_recording
from ..weights import Grouped, Weight
from .backend import C
from .linear import product, refuses_product


def refuses_lm_head(x: Tensor, norm_weight: Tensor, eps: float, weight: Weight) -> str | None:
    return refuses_product(x, weight)


@C.implements(refuses_lm_head)
def lm_head(x: Tensor, norm_weight: Tensor, eps: float, weight: Weight) -> Tensor:
    return product(x, norm_weight, eps, weight, out_dtype=torch.float32)


def refuses_lm_head_top_k(x: Tensor, norm_weight: Tensor, eps: float, weight: Weight, k: int) -> str | None:
    if is_recording():
        return "a top k while calls are recorded (torch sorts)"
    if not isinstance(weight, Grouped):
        return f"weights of the format {weight.format} for a top k"
    return refuses_product(x, weight)


@C.implements(refuses_lm_head_top_k)
def lm_head_top_k(x: Tensor, norm_weight: Tensor, eps: float, weight: Weight, k: int) -> tuple[Tensor, Tensor]:
    values, ids = lm_head(x, norm_weight, eps, weight).sort(dim=-1, descending=True, stable=True)
    return values[:, :k], ids[:, :k]
