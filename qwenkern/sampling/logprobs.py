"""Log-probabilities of the chosen token and of the most likely tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .parameters import SampledSequence


@dataclass(frozen=True)
class TokenLogprob:
    """The model's own natural log-probabilities, before temperature and penalties."""

    token_id: int
    logprob: float
    top: dict[int, float]  # token id -> log-probability, in descending order


def logprobs_of(logits: Tensor, sequences: Sequence[SampledSequence]) -> list[tuple[Tensor, int] | None]:
    """Log-probabilities [V] and the number of tokens to report, for each sequence that requests them, else None. Call
    this before anything changes the logits."""
    wanted = [sequence.params.logprobs for sequence in sequences]
    return [None if k is None else (logits[index].log_softmax(-1), k) for index, k in enumerate(wanted)]


def with_logprobs(of: tuple[Tensor, int], token: int) -> TokenLogprob:
    logprobs, k = of
    values, ids = logprobs.topk(min(k, len(logprobs)))
    return TokenLogprob(token, logprobs[token].item(), dict(zip(ids.tolist(), values.tolist(), strict=True)))
