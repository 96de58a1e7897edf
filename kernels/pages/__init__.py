"""Formats of the key-value cache's pages. A layer's pages are one value to the ops; one file a format.

To add a format: a file here with a subclass of Pages, which is found by itself. What each member is for stands in
``Pages``; ``dense.py`` is the example.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..discovery import import_files
from .base import FORMATS, Pages
from .dense import DensePages

import_files(__name__, __path__)


def as_pages(value: Any, form: str = "dense") -> Any:
    """A pair of tensors (k, v) as dense pages; the tensors of pages, in the order in which they name them, as those of
    a format. Anything else as it is, for the checks of an op to refuse."""
    if isinstance(value, (list, tuple)) and all(isinstance(each, Tensor) for each in value):
        if form not in FORMATS:
            raise ValueError(f"pages have no format {form!r}; expected one of {', '.join(FORMATS)}")
        if len(value) == len(FORMATS[form].names):
            return FORMATS[form](*value)
    return value


def check_pages(op: str, pages: Any, like: Tensor, head_dim: int | str = "D") -> None:
    """Raises unless these are cache pages for tensors of the dtype of ``like``, with heads of this size, or of any."""
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
