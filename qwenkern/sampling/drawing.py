"""What a batch of sequences needs of the draw, and the numbers that say how each sequence draws.

A captured step is made for a `Drawing`. Sequences that need less take part with neutral numbers, which change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from .parameters import MAX_LOGPROBS, SampledSequence

FEW_CANDIDATES = 64  # used if no row needs more: faster than looking through the vocabulary
FEW_LOGPROBS = 20  # likewise: what most clients request at most


class Drawing(NamedTuple):
    """The parts of a draw that at least one sequence of a batch needs. There are 18, so captured steps stay few."""

    candidates: int = 1  # the most likely tokens to draw from: 1 (greedy), FEW_CANDIDATES or the size of the vocabulary
    adjusts: bool = False  # penalties, biases, min_tokens or a grammar's mask change the logits first
    logprobs: int | None = None  # of the chosen token and of so many most likely ones

    @staticmethod
    def of(sequences: Sequence[SampledSequence], vocabulary: int) -> Drawing:
        """The drawing that serves all of these sequences."""
        params = [sequence.params for sequence in sequences]
        largest = max([1, *(each.top_k or vocabulary for each in params if not each.is_greedy)])
        logprobs = [each.logprobs for each in params if each.logprobs is not None]
        return Drawing(
            candidates=next((count for count in (1, FEW_CANDIDATES) if largest <= count < vocabulary), vocabulary),
            adjusts=any(each.changes_logits for each in params),
            logprobs=min(vocabulary, FEW_LOGPROBS if max(logprobs) <= FEW_LOGPROBS else MAX_LOGPROBS)
            if logprobs
            else None,
        )

    @property
    def is_greedy(self) -> bool:
        """Whether only the largest logit of each row is needed."""
        return self == Drawing()


ROWS = 4  # temperature, top_k, top_p, min_p: what `draw` takes
ADJUSTING_ROWS = 8  # and repetition, presence and frequency penalty, and the tokens left until an end may come


def settings_of(sequences: Sequence[SampledSequence]) -> list[list[float]]:
    """ADJUSTING_ROWS rows with a number for each sequence. A greedy sequence draws from one token."""
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
        float(min(params.min_tokens, 2**24) - len(sequence.output_ids)),  # float32 counts exactly up to there
    )
