"""The operations that a batch of sequences needs to draw tokens, and the parameters of each sequence as numbers.

A captured step is made for a `Drawing`. Sequences that need fewer operations get neutral numbers, which have no effect.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from .parameters import MAX_LOGPROBS, SampledSequence

FEW_LOGPROBS = 20  # what most clients request at most; a batch with more reports MAX_LOGPROBS


class Drawing(NamedTuple):
    """The operations that at least one sequence of a batch needs. Only 12 values exist, so captured steps are few."""

    is_random: bool = False  # else all are greedy
    adjusts: bool = False  # penalties, biases, min_tokens or a grammar's mask change the logits first
    logprobs: int | None = None  # for the chosen token and for this number of most likely ones

    @staticmethod
    def of(sequences: Sequence[SampledSequence], vocabulary: int) -> Drawing:
        """The Drawing with all operations that these sequences need."""
        params = [sequence.params for sequence in sequences]
        logprobs = [each.logprobs for each in params if each.logprobs is not None]
        return Drawing(
            is_random=any(not each.is_greedy and each.top_k != 1 for each in params),
            adjusts=any(each.changes_logits for each in params),
            logprobs=min(vocabulary, FEW_LOGPROBS if max(logprobs) <= FEW_LOGPROBS else MAX_LOGPROBS)
            if logprobs
            else None,
        )

    @property
    def is_greedy(self) -> bool:
        """Whether only the largest logit of each row is needed."""
        return self == Drawing()


DRAW_ROWS = 4  # temperature, top_k, top_p, min_p: what ops.draw takes
# The rest are what ops.penalise takes: repetition, presence and frequency penalty, and tokens until an end is allowed.
NEUTRAL = (1.0, 1.0, math.inf, 0.0, 1.0, 0.0, 0.0, 0.0)  # greedy


def settings_of(sequences: Sequence[SampledSequence]) -> list[list[float]]:
    """A row for each of NEUTRAL's numbers, with a number for each sequence. A greedy sequence has top_k 1."""
    return [list(row) for row in zip(*map(_settings_of, sequences), strict=True)]


def _settings_of(sequence: SampledSequence) -> tuple[float, ...]:
    params = sequence.params
    return (
        1.0 if params.is_greedy else params.temperature or 0.0,
        1.0 if params.is_greedy else min(params.top_k or 0, 2**31) or math.inf,
        params.top_p if params.top_p is not None and params.top_p < 1 else math.inf,
        params.min_p or 0.0,
        1.0 if params.repetition_penalty is None else params.repetition_penalty,
        params.presence_penalty,
        params.frequency_penalty,
        float(min(params.min_tokens, 2**24) - len(sequence.output_ids)),  # float32 has all whole numbers up to 2**24
    )
