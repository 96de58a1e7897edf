"""Computes how much memory a model takes, before it is loaded.

`layout.py` counts bytes, `choice.py` makes a Layout from a user's options, `fit.py` refuses models that do not fit,
`room.py` sizes the cache, `memory.py` has the memory of this machine, `cards.py` that of common GPUs, and `case.py`
lists the cards that a model fits.
"""

from __future__ import annotations

from .choice import layout_of
from .fit import refuse_too_large
from .layout import Footprint, Layout, default_chunk
from .memory import Memory, memory_of
from .room import cache_room

__all__ = [
    "Footprint",
    "Layout",
    "Memory",
    "cache_room",
    "default_chunk",
    "layout_of",
    "memory_of",
    "refuse_too_large",
]
