"""Finds full pages by the tokens that they and all pages before them hold, as a tree of pages.

    root ─► page of tokens 0..63 ─► page of tokens 64..127 ─► ...
                    └────────────► another page of tokens 64..127

The tree compares the token ids themselves, so pages of different texts are never mistaken for each other.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Sequence
from typing import NamedTuple

Parent = int | str  # the id of the page before; for the first page of a text the salt


class Entry(NamedTuple):
    """A page that can be found."""

    id: int  # never used again, unlike the number of the page
    page: int


class PrefixIndex:
    """The pages that can be found. The allocator says when a page gets other tokens (`forget`)."""

    def __init__(self) -> None:
        self._entries: dict[tuple[Parent, bytes], Entry] = {}
        self._keys: dict[int, tuple[Parent, bytes]] = {}  # of each page
        self._ids = itertools.count()

    def __contains__(self, page: int) -> bool:
        return page in self._keys

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, parent: Parent, ids: Sequence[int], page_size: int) -> list[Entry]:
        """The pages that hold the longest beginning of ``ids`` after ``parent``."""
        found: list[Entry] = []
        for start in range(0, len(ids) - page_size + 1, page_size):
            entry = self._entries.get((parent, _key(ids[start : start + page_size])))
            if entry is None:
                break
            found.append(entry)
            parent = entry.id
        return found

    def add(self, parent: Parent, ids: Sequence[int], page: int) -> Entry:
        """Enters a page that holds ``ids`` after ``parent``. If another page has these tokens there already, its entry
        stays. Returns the entry."""
        key = parent, _key(ids)
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = Entry(next(self._ids), page)
            self._keys[page] = key
        return entry

    def forget(self, page: int) -> None:
        """Removes a page. Pages after it are not found any more, until they are entered again after another page."""
        key = self._keys.pop(page, None)
        if key is not None:
            del self._entries[key]


def _key(ids: Sequence[int]) -> bytes:
    return array("i", ids).tobytes()
