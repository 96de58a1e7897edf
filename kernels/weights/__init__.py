"""Formats of weights. An op takes a weight as one value, whatever tensors its format consists of. Each format has a
file.

To add a format, write a file here with a subclass of Weight, and import it below. ``Weight`` says what each member must
do; ``dense.py`` is the example.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .base import FORMATS, Weight
from .dense import Dense


def as_weight(value: Any, form: str = "dense") -> Any:
    """Converts a tensor to a dense weight, and a list of tensors to a weight of the format ``form``. The list has the
    order of the format's ``names``. Returns any other value unchanged; the checks of the op then raise."""
    if isinstance(value, Tensor):
        return Dense(value)
    if isinstance(value, list) and all(isinstance(each, Tensor) for each in value):
        if form not in FORMATS:
            raise ValueError(f"weights have no format {form!r}; expected one of {', '.join(FORMATS)}")
        if len(value) == len(FORMATS[form].names):
            return FORMATS[form](*value)
    return value


__all__ = ["FORMATS", "Dense", "Weight", "as_weight"]
