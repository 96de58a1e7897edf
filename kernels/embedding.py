"""Rows of the embedding table: what the graph begins with. torch's indexing is one kernel already."""

from __future__ import annotations

from torch import Tensor

from .checks import INTEGERS, check_device, check_range, check_tensor
from .contract import Steps, op
from .weights import Weight, check_matrix


@op()
def embedding(ids: Tensor, weight: Weight) -> Steps[Tensor]:
    """Rows [T, K] of weight [V, K] with the numbers ids [T] (integers), which on a GPU are not checked."""
    check_tensor("embedding", "ids", ids, ("tokens",), dtypes=INTEGERS)
    check_matrix("embedding", "weight", weight)
    check_device("embedding", ids=ids, weight=weight)
    check_range("embedding", "ids", ids, 0, weight.shape[0])
    yield
    return weight.take(ids)
