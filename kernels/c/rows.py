"""Tensors as rows that C loops over, and the number of threads for an op."""

from __future__ import annotations

from torch import Tensor

SMALL = 1 << 15  # one thread finishes so few elements before it could wake another thread


def rows(x: Tensor) -> Tensor:
    """x [..., H] as [T, H]. Copies x only if its rows are not a constant stride apart."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def dense_heads(x: Tensor) -> Tensor:
    """x [T, heads, D] with dense heads. Copies x only if the heads of a token are not adjacent."""
    return x if x.stride(1) == x.shape[2] else x.contiguous()


def team_of(elements: int) -> int | None:
    """The number of threads for an op with this number of elements. None: all threads."""
    return 1 if elements <= SMALL else None
