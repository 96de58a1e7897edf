"""The last norm and the product with the vocabulary in C. kernels/lm_head.py says what is computed."""

from __future__ import annotations

import torch
from torch import Tensor

from ..weights import Weight
from .backend import C
from .linear import product, refuses_product


def refuses_lm_head(x: Tensor, norm_weight: Tensor, eps: float, weight: Weight) -> str | None:
    return refuses_product(x, weight)


@C.implements(refuses_lm_head)
def lm_head(x: Tensor, norm_weight: Tensor, eps: float, weight: Weight) -> Tensor:
    return product(x, norm_weight, eps, weight, out_dtype=torch.float32)
