"""Log-probabilities of the chosen token and of the most likely tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..kernels import most_likely
from .parameters import SampledSequence


@dataclass(frozen=True)
class TokenLogprob:
    """The model's own natural log-probabilities, before temperature and penalties."""

    token_id: int
    logprob: float
    top: dict[int, float]  # token id -> log-probability, in descending order


def logprobs_of(logits: Tensor, sequences: Sequence[SampledSequence]) -> list[tuple[Tensor, int] | None]:
    """For each sequence: log-probabilities [V] and the number of tokens to report, or None if it does not request them.
    Call this before the logits are changed."""
    wanted = [sequence.params.logprobs for sequence in sequences]
    return [None if k is None else (logits[index].log_softmax(-1), k) for index, k in enumerate(wanted)]


def with_logprobs(of: tuple[Tensor, int], token: int) -> TokenLogprob:
    logprobs, k = of
    if not k:
        return TokenLogprob(token, logprobs[token].item(), {})
    values, ids = (each[0].tolist() for each in most_likely(logprobs[None], min(k, len(logprobs))))
    return TokenLogprob(token, logprobs[token].item(), dict(zip(ids, values, strict=True)))


def packed(logprobs: Tensor, tokens: Tensor, count: int) -> list[Tensor]:
    """From log-probabilities [R, V]: those of the tokens, [R, 1], and those of the ``count`` most likely tokens and the
    ids of these, [R, count] each. `unpacked` takes a row of the three joined."""
    values, ids = most_likely(logprobs, count)
    return [logprobs.gather(-1, tokens[:, None]), values, ids]


def unpacked(token: int, row: Sequence[float], count: int) -> TokenLogprob:
    """The log-probabilities of a token and of ``count`` of the most likely ones."""
    logprob, *rest = row
    values, ids = rest[: len(rest) // 2], rest[len(rest) // 2 :]
    return TokenLogprob(token, logprob, {int(each): value for each, value in zip(ids[:count], values, strict=False)})
