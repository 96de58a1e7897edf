"""Formats of the key-value cache's pages. An op takes the pages of a layer as one value. Each format has a file.

To add a format, write a file here with a subclass of Pages. Every file here is
imported. ``Pages`` says what each member must do; ``dense.py`` is the example.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..discovery import import_files
from .base import FORMATS, Pages
from .dense import DensePages

import_files(__name__, __path__)


def as_pages(value: Any, form: str = "dense") -> Any:
    """Converts a pair of tensors (k, v) to dense pages, and a list of tensors to pages of the format ``form``. The list
    has the order of the format's ``names``. Returns any other value unchanged; the checks of the op then raise."""
    if isinstance(value, (list, tuple)) and all(isinstance(each, Tensor) for each in value):
        if form not in FORMATS:
            raise ValueError(f"pages have no format {form!r}; expected one of {', '.join(FORMATS)}")
        if len(value) == len(FORMATS[form].names):
            return FORMATS[form](*value)
    return value


def check_pages(op: str, pages: Any, like: Tensor, head_dim: int | str = "D") -> None:
    """Raises ValueError or TypeError unless these are cache pages for tensors of the dtype of ``like``. ``head_dim`` is
    the required size of a head; a string stands for any size."""
    if isinstance(pages, (list, tuple)):
        if len(pages) != len(DensePages.names):
            raise TypeError(f"{op}: pages must be Pages or a pair of tensors, and is {len(pages)} values")
        for name, each in zip(DensePages.names, pages, strict=True):
            if not isinstance(each, Tensor):
                raise TypeError(f"{op}: {name} must be a tensor, and is {type(each).__name__}")
    if not isinstance(pages, Pages):
        raise TypeError(f"{op}: pages must be Pages or a pair of tensors, and is {type(pages).__name__}")
    pages.check(op, like, head_dim)


__all__ = ["FORMATS", "DensePages", "Pages", "as_pages", "check_pages"]
