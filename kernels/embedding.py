"""Rows of the embedding table: what the graph begins with. torch's indexing is one kernel already."""

from __future__ import annotations

from torch import Tensor

from . import c as c_backend
from . import reference
from .checks import INTEGERS, check_device, check_range, check_tensor
from .dispatch import op


def _fake_embedding(ids: Tensor, weight: Tensor) -> Tensor:
    return weight.new_empty(ids.shape[0], weight.shape[1])


@op(fake=_fake_embedding)
def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """Rows [T, K] of weight [V, K] with the numbers ids [T] (integers), which on a GPU are not checked."""
    check_tensor("embedding", "ids", ids, ("tokens",), dtypes=INTEGERS)
    check_tensor("embedding", "weight", weight, ("V", "K"))
    check_device("embedding", ids=ids, weight=weight)
    check_range("embedding", "ids", ids, 0, len(weight))
    if c_backend.takes(c_backend.refuses_embedding, ids, weight):
        return c_backend.embedding(ids, weight)
    return reference.embedding(ids, weight)
