"""Rows of the embedding table, copied in C. kernels/embedding.py says what is computed."""

from __future__ import annotations

from torch import Tensor

from . import build
from .backend import C
from .calls import make
from .recorded_calls import run


def refuses_embedding(ids: Tensor, weight: Tensor) -> str | None:
    if weight.stride(1) != 1:
        return f"a table whose values lie {weight.stride(1)} apart (side by side)"
    return build.refuses_dtype(weight.dtype)


@C.implements(refuses_embedding)
def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    num_tokens, row_size = len(ids), weight.shape[1]
    out = weight.new_empty(num_tokens, row_size)
    run(
        make.embedding(
            out=out,
            table=weight,
            ids=ids.long().contiguous(),
            num_tokens=num_tokens,
            row_size=row_size,
            table_stride=weight.stride(0),
        )
    )
    return out
