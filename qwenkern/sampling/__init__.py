"""How the next token is chosen from the logits."""

from .sampling import (
    BELOW_ONE,
    NOT_FINITE,
    Row,
    SamplingParams,
    Settings,
    TokenLogprob,
    draw,
    draw_width,
    or_not_finite,
    sample,
)

__all__ = [
    "BELOW_ONE",
    "NOT_FINITE",
    "Row",
    "SamplingParams",
    "Settings",
    "TokenLogprob",
    "draw",
    "draw_width",
    "or_not_finite",
    "sample",
]
