"""Converts a layer's cache pages, of each format, to the fields of the struct ``pages`` in calls.h, in order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..pages import Pages
from .calls import LAYOUT

# k, v, the scales of both, channels, tokens of a page, heads, format
PagesStruct = tuple[Tensor, Tensor, "Tensor | None", "Tensor | None", "Tensor | None", int, int, int]
_NUMBERS = {name: number for number, name in enumerate(LAYOUT.lists["PAGES_FORMAT"])}

# The first five fields
STRUCTS: dict[str, Callable[[Any], tuple]] = {
    "dense": lambda pages: (pages.k, pages.v, None, None, None),
    "float16": lambda pages: (pages.k, pages.v, None, None, None),
    "int8": lambda pages: pages.tensors,
    "fp8": lambda pages: (*pages.tensors[:4], None),
}


def refuses_pages(pages: Pages) -> str | None:
    """The reason why no C op takes these pages, or None."""
    if pages.format not in STRUCTS:
        return f"pages of the format {pages.format} (C has {', '.join(STRUCTS)})"
    scales = pages.tensors[2:4]
    if len(scales) == 2 and scales[0].dtype != torch.float32:
        return f"scales in {str(scales[0].dtype).removeprefix('torch.')} (C reads float32)"
    return None


def pages_struct(pages: Pages) -> PagesStruct:
    _, page_size, num_heads, _ = pages.shape
    return *STRUCTS[pages.format](pages), page_size, num_heads, _NUMBERS[pages.format]
