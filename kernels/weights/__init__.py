"""Formats of weights. A weight is one value to the ops, whatever tensors it consists of; one file a format.

To add a format: a file here with a subclass of Weight, and its import below. What each member is for stands in
``Weight``; ``dense.py`` is the example.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .base import FORMATS, Weight
from .dense import Dense


def as_weight(value: Any, form: str = "dense") -> Any:
    """A tensor as a dense weight; the tensors of a weight, in the order in which it names them, as one of a format.
    Anything else as it is, for the checks of an op to refuse."""
    if isinstance(value, Tensor):
        return Dense(value)
    if isinstance(value, list) and all(isinstance(each, Tensor) for each in value):
        if form not in FORMATS:
            raise ValueError(f"weights have no format {form!r}; expected one of {', '.join(FORMATS)}")
        if len(value) == len(FORMATS[form].names):
            return FORMATS[form](*value)
    return value


__all__ = ["FORMATS", "Dense", "Weight", "as_weight"]
