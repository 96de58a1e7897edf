"""Draws one token id for each row of logits. Nothing here makes a GPU wait, so a CUDA graph can capture it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import kernels as ops

BELOW_ONE = 1 - 2**-24  # a number closer to 1 rounds to 1 in float32, and would draw an excluded token
_RUN = 128  # logits whose largest is found first
NOT_FINITE = -1  # in place of a token id if the largest logit of the row is NaN or infinite


def or_not_finite(ids: Tensor, largest: Tensor) -> Tensor:
    """Token ids [R], and NOT_FINITE where the largest logit of the row [R] is NaN or infinite."""
    return torch.where(largest.abs() < math.inf, ids, NOT_FINITE)


def draw(logits: Tensor, largest: Tensor, settings: Tensor | None, uniforms: Tensor | None) -> Tensor:
    """A token id for each row of logits [R, V] float32, as ops.draw: ids [R]. Without settings all rows are greedy. A
    row that is not finite gets an arbitrary id."""
    if settings is None:
        return _first_largest(logits)
    assert uniforms is not None, "a choice among several tokens takes a random number for each row"
    return ops.draw(logits, largest, settings, uniforms)


def _first_largest(logits: Tensor) -> Tensor:
    """logits.argmax(-1). On a CPU torch's argmax looks at one value at a time, and amax at a register of them."""
    if not logits.is_cpu or logits.shape[-1] % _RUN or not logits.is_contiguous():
        return logits.argmax(-1)
    runs = logits.view(len(logits), -1, _RUN)
    run = runs.amax(-1).argmax(-1, keepdim=True)
    within = runs.take_along_dim(run[..., None], 1).squeeze(1).argmax(-1, keepdim=True)
    return (run * _RUN + within).squeeze(1)
