"""Rows of the embedding table, copied or dequantised in C. kernels/embedding.py says what is computed."""

from __future__ import annotations

import torch
from torch import Tensor

from ..weights import Weight
from . import build
from .backend import C
from .calls import make
from .recorded_calls import run
from .weights import refuses_weight, weight_struct


def refuses_embedding(ids: Tensor, weight: Weight) -> str | None:
    return refuses_weight(weight) or build.refuses_dtype(weight.dtype)


@C.implements(refuses_embedding)
def embedding(ids: Tensor, weight: Weight) -> Tensor:
    num_tokens, row_size = len(ids), weight.shape[1]
    out = torch.empty(num_tokens, row_size, dtype=weight.dtype, device=weight.device)
    run(
        make.embedding(
            out=out,
            table=weight_struct(weight),
            ids=ids.long().contiguous(),
            num_tokens=num_tokens,
            row_size=row_size,
        )
    )
    return out
