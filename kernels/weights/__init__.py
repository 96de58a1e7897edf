"""Formats of weights. An op takes a weight as one value; its format decides which tensors the value has. Each format
has a file.

To add a format, write a file here with a subclass of Weight. Every file here is
imported. ``Weight`` says what each member must do; ``dense.py`` is the example.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..discovery import import_files
from .base import FORMATS, Weight
from .dense import Dense
from .grouped import Grouped
from .stack import Stack, joined

import_files(__name__, __path__)


def as_weight(value: Any, form: str = "dense") -> Any:
    """Converts a tensor to a dense weight, and a list of tensors to a weight of the format ``form``. The list has the
    order of the format's ``names``. A format "a+b" is a Stack. Returns any other value unchanged; the checks of the op
    then raise."""
    if isinstance(value, Tensor):
        return Dense(value)
    if isinstance(value, list) and all(isinstance(each, Tensor) for each in value):
        if "+" in form:
            return Stack.of_tensors(value, form)
        if form not in FORMATS:
            raise ValueError(f"weights have no format {form!r}; expected one of {', '.join(FORMATS)}")
        if len(value) == len(FORMATS[form].names):
            return FORMATS[form](*value)
    return value


def check_weight(op: str, name: str, weight: Any, x: Tensor) -> None:
    """Raises ValueError or TypeError unless this is a weight [N, K] for x [T, K], with x's dtype."""
    _check_type(op, name, weight)
    weight.check(op, name, ("N", x.shape[1]), x)


def check_matrix(op: str, name: str, weight: Any) -> None:
    """Raises ValueError or TypeError unless this is a weight [V, K]."""
    _check_type(op, name, weight)
    weight.check(op, name, ("V", "K"))


def _check_type(op: str, name: str, weight: Any) -> None:
    if not isinstance(weight, Weight):
        raise TypeError(f"{op}: {name} must be a tensor or a Weight, and is {type(weight).__name__}")


__all__ = ["FORMATS", "Dense", "Grouped", "Stack", "Weight", "as_weight", "check_matrix", "check_weight", "joined"]
