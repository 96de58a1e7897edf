"""Draws one token id for each row of logits. Nothing here waits for a device, so a CUDA graph can capture it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .parameters import SampledSequence

FEW_CANDIDATES = 64  # used if no row needs more: faster than sorting the vocabulary
BELOW_ONE = 1 - 2**-24  # a number closer to 1 rounds to 1 in float32, and would draw an excluded token
NOT_FINITE = -1  # in place of a token id if the largest logit of the row is NaN or infinite


@dataclass(frozen=True)
class DrawSettings:
    """How each of R rows draws its token, as tensors."""

    values: Tensor  # [4, R] float32: temperature (0: greedy), top_k, top_p, min_p
    uniforms: Tensor  # [R] float32: a random number in [0, 1)

    @staticmethod
    def neutral(size: int, device: torch.device) -> DrawSettings:
        """Settings with which all rows are greedy."""
        return DrawSettings(*(torch.zeros(*shape, size, dtype=torch.float32, device=device) for shape in ((4,), ())))

    @staticmethod
    def of(sequences: Sequence[SampledSequence]) -> list[list[float]]:
        """The rows of ``values`` for some sequences."""
        columns = [
            (
                0.0 if params.is_greedy else params.temperature or 0.0,
                min(params.top_k or 0, 2**31) or math.inf,
                params.top_p if params.top_p is not None and params.top_p < 1 else math.inf,
                params.min_p or 0.0,
            )
            for params in (sequence.params for sequence in sequences)
        ]
        return [list(values) for values in zip(*columns, strict=True)]


def num_candidates(sequences: Sequence[SampledSequence], vocabulary: int) -> int:
    """The number of most likely tokens from which all the sequences can be drawn: 1, FEW_CANDIDATES or the size of the
    vocabulary."""
    each = (sequence.params for sequence in sequences)
    largest = max(1 if params.is_greedy else params.top_k or vocabulary for params in each)
    return next((count for count in (1, FEW_CANDIDATES) if largest <= count), vocabulary)


def or_not_finite(ids: Tensor, largest: Tensor) -> Tensor:
    """Token ids [R], and NOT_FINITE where the largest logit of the row [R] is NaN or infinite."""
    return torch.where(largest.abs() < math.inf, ids, NOT_FINITE)


def draw(logits: Tensor, settings: DrawSettings | None, candidates: int, some_greedy: bool = True) -> Tensor:
    """Draws one token id for each row of logits [R, V] from its ``candidates`` most likely tokens: ids [R].

    The draw inverts the cumulative distribution at the row's random number. With one candidate, settings may be None.
    A row that is not finite gets an arbitrary id."""
    if candidates == 1:
        return logits.argmax(-1)
    assert settings is not None, "a choice among several tokens takes settings"
    temperature, top_k, top_p, min_p = settings.values[..., None]
    few = candidates < logits.shape[-1]
    values, ids = logits.topk(candidates) if few else logits.sort(-1, descending=True)
    # The first column is the maximum. Subtracting it before the division avoids overflow.
    values = (values - values[:, :1]) / torch.where(temperature > 0, temperature, 1.0)
    ranks = torch.arange(values.shape[-1], device=logits.device)
    probabilities = values.masked_fill(ranks >= top_k, -math.inf).softmax(-1)
    before = probabilities.double().cumsum(-1) - probabilities
    dropped = (before >= top_p) | (probabilities < probabilities[:, :1] * min_p)
    dropped &= ranks > 0
    cumulative = probabilities.masked_fill(dropped, 0.0).double().cumsum(-1)
    target = settings.uniforms.double()[:, None] * cumulative[:, -1:]
    chosen = (cumulative <= target).sum(-1, keepdim=True)
    drawn = ids.gather(-1, chosen.clamp(max=ids.shape[-1] - 1)).squeeze(-1)
    return torch.where(temperature[:, 0] > 0, drawn, logits.argmax(-1)) if some_greedy else drawn
