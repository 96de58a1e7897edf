"""How much memory a model takes, computed before any of it is taken.

`layout.py` counts, `choice.py` makes its input of a user's words, `fit.py` refuses what will not fit, `room.py` sizes
the cache, `memory.py` says what this machine has, `cards.py` what others have, and `case.py` who fits where.
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
