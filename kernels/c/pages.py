"""Converts a layer's cache pages, of each format, to the fields of the struct ``pages`` in calls.h, in order."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..pages import DensePages, Pages
from .calls import LAYOUT

PagesStruct = tuple[Tensor, Tensor, int, int, int]
_NUMBERS = {name: number for number, name in enumerate(LAYOUT.lists["PAGES_FORMAT"])}


def _dense(pages: DensePages) -> PagesStruct:
    _, page_size, num_kv_heads, head_dim = pages.k.shape
    return pages.k, pages.v, page_size, pages.k.element_size() * num_kv_heads * head_dim, _NUMBERS["dense"]


STRUCTS: dict[str, Callable[..., PagesStruct]] = {"dense": _dense}


def refuses_pages(pages: Pages) -> str | None:
    if pages.format not in STRUCTS:
        return f"pages of the format {pages.format} (C has {', '.join(STRUCTS)})"
    return None


def pages_struct(pages: Pages) -> PagesStruct:
    return STRUCTS[pages.format](pages)
