"""Rows of the embedding table, the first op of the graph."""

from __future__ import annotations

from torch import Tensor

from .checks import INTEGERS, check_device, check_range, check_tensor
from .contract import Steps, op
from .weights import Weight, check_matrix


@op()
def embedding(ids: Tensor, weight: Weight) -> Steps[Tensor]:
    """The rows [T, K] of weight [V, K] that ids [T] (integers) select. An id is from 0 to V - 1; on a GPU the ids are
    not checked."""
    check_tensor("embedding", "ids", ids, ("tokens",), dtypes=INTEGERS)
    check_matrix("embedding", "weight", weight)
    check_device("embedding", ids=ids, weight=weight)
    check_range("embedding", "ids", ids, 0, weight.shape[0])
    yield
    return weight.take(ids)
