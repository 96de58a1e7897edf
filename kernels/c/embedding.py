"""Rows of the embedding table, copied in C. kernels/embedding.py says what is computed."""

from __future__ import annotations

from torch import Tensor

from ..weights import Dense, Weight
from . import build
from .backend import C
from .calls import make
from .recorded_calls import run


def refuses_embedding(ids: Tensor, weight: Weight) -> str | None:
    if not isinstance(weight, Dense):
        return f"tables of the format {weight.format} (C copies dense rows)"
    return build.refuses_dtype(weight.dtype)


@C.implements(refuses_embedding)
def embedding(ids: Tensor, weight: Weight) -> Tensor:
    table = weight.dequantise()
    num_tokens, row_size = len(ids), table.shape[1]
    out = table.new_empty(num_tokens, row_size)
    run(
        make.embedding(
            out=out,
            table=table,
            ids=ids.long().contiguous(),
            num_tokens=num_tokens,
            row_size=row_size,
            table_stride=table.stride(0),
        )
    )
    return out
