"""Draws the next token of each sequence of a batch, with all steps of SamplingParams."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import RequestError
from .draw import NOT_FINITE, DrawSettings, draw, num_candidates
from .logprobs import TokenLogprob, logprobs_of, with_logprobs
from .parameters import SampledSequence
from .penalties import choice_errors, options_like, penalise

# A token id, or a TokenLogprob if the sequence requests log-probabilities. NOT_FINITE if the largest logit is NaN or
# infinite. An error if the sequence's own biases and penalties leave no token to draw.
Sampled = int | TokenLogprob | RequestError


@torch.inference_mode()
def sample(logits: Tensor, sequences: Sequence[SampledSequence]) -> list[Sampled]:
    """The next token of each row of logits [R, V]. The logits are float32, and may be overwritten."""
    finite = [math.isfinite(top) for top in logits.amax(-1).tolist()]  # amax is NaN if any logit is
    logprobs = logprobs_of(logits, sequences)
    changed = [index for index, each in enumerate(sequences) if each.params.changes_logits and finite[index]]
    for index in changed:
        penalise(logits[index], sequences[index])
    errors = choice_errors(logits, sequences, changed) if changed else {}
    candidates = num_candidates(sequences, logits.shape[-1])
    is_greedy = [sequence.params.is_greedy for sequence in sequences]
    settings = None
    if candidates > 1:
        numbers = [0.0 if greedy else sequence.uniform() for greedy, sequence in zip(is_greedy, sequences, strict=True)]
        values = DrawSettings.of(sequences)
        settings = DrawSettings(*(torch.tensor(each, **options_like(logits)) for each in (values, numbers)))
    drawn: list[int] = draw(logits, settings, candidates, any(is_greedy)).tolist()
    tokens: list[Sampled] = [*drawn]
    for index, of in enumerate(logprobs):
        if not finite[index]:
            tokens[index] = NOT_FINITE
        elif index in errors:
            tokens[index] = errors[index]
        elif of is not None:
            tokens[index] = with_logprobs(of, drawn[index])
    return tokens
