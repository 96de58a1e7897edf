"""Chooses the next token from the logits: parameters, penalties, the draw, log-probabilities."""

from .draw import BELOW_ONE, NOT_FINITE, DrawSettings, draw, num_candidates, or_not_finite
from .logprobs import TokenLogprob
from .parameters import SampledSequence, SamplingParams
from .sampler import Sampled, sample

__all__ = [
    "BELOW_ONE",
    "NOT_FINITE",
    "DrawSettings",
    "Sampled",
    "SampledSequence",
    "SamplingParams",
    "TokenLogprob",
    "draw",
    "num_candidates",
    "or_not_finite",
    "sample",
]
