"""Tensors as the rows that C goes through, and how many threads share the work on them."""

from __future__ import annotations

from torch import Tensor

SMALL = 1 << 15  # elements that one thread is through with before it has woken another


def rows(x: Tensor) -> Tensor:
    """x [..., H] as [T, H]; a copy only where its rows are not one stride apart."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def dense_heads(x: Tensor) -> Tensor:
    """x [T, heads, D]; a copy only where a token's heads do not lie one after the other."""
    return x if x.stride(1) == x.shape[2] else x.contiguous()


def team_of(elements: int) -> int | None:
    """How many threads share the work of an op over so many elements; None: all."""
    return 1 if elements <= SMALL else None
