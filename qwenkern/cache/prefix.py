"""The prefix index: a tree that finds full pages by their own tokens and the tokens of all pages before them.

    root ─► page of tokens 0..63 ─► page of tokens 64..127 ─► ...
                    └────────────► another page of tokens 64..127

The tree compares token ids, not hashes, so it never confuses pages of different texts.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Sequence
from typing import NamedTuple

Parent = int | str  # the entry id of the page before; for the first page of a text, the salt


class Entry(NamedTuple):
    """A page that can be found."""

    id: int  # never reused, unlike the number of the page
    page: int


class PrefixIndex:
    """The pages that can be found. The allocator calls `forget` when a page gets other tokens."""

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
        """Adds a page that holds ``ids`` after ``parent``, and returns its entry. If another page with these tokens is
        there already, returns the entry of that page."""
        key = parent, _key(ids)
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = Entry(next(self._ids), page)
            self._keys[page] = key
        return entry

    def forget(self, page: int) -> None:
        """Removes a page. The pages after it are not found any more, until they are added again after another page."""
        key = self._keys.pop(page, None)
        if key is not None:
            del self._entries[key]


def _key(ids: Sequence[int]) -> bytes:
    return array("i", ids).tobytes()
