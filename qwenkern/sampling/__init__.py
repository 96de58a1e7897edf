"""Chooses the next token from the logits: parameters, penalties, the draw, log-probabilities."""

from .draw import BELOW_ONE, NOT_FINITE, draw, or_not_finite
from .drawing import Drawing
from .grammar import grammar_of
from .grammar_compiler import Grammars
from .history import TokenHistory
from .logprobs import TokenLogprob
from .matcher import Matcher, Overrun
from .on_device import TokenStates
from .parameters import SampledSequence, SamplingParams
from .sampler import Sampled, Sampling, sample, sampled

__all__ = [
    "BELOW_ONE",
    "NOT_FINITE",
    "Drawing",
    "Grammars",
    "Matcher",
    "Overrun",
    "Sampled",
    "SampledSequence",
    "Sampling",
    "SamplingParams",
    "TokenHistory",
    "TokenLogprob",
    "TokenStates",
    "draw",
    "grammar_of",
    "or_not_finite",
    "sample",
    "sampled",
]
