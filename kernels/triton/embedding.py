"""Rows of the embedding table. One kernel dequantises the rows of a quantised table (dequantise.py). Torch's indexing,
also a single kernel, copies the rows of a dense table."""

from __future__ import annotations

import torch
from torch import Tensor

from ..weights import Weight
from .backend import TRITON
from .dequantise import dequantise_ids


@TRITON.implements()
def embedding(ids: Tensor, weight: Weight) -> Tensor:
    if weight.triton_dequantise is None:
        return weight.take(ids)
    out = torch.empty(len(ids), weight.shape[1], dtype=weight.dtype, device=ids.device)
    dequantise_ids(out, weight, ids)
    return out
