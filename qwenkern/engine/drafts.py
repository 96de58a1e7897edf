"""Guesses the next tokens of a text from the text itself: what followed the last time that it said the same.

    ... the quick brown fox jumps ...  ...  the quick brown ─► fox jumps
        └─────────────┘ the same tokens earlier   └ the end ┘    the draft

Code that is edited, quotations and lists repeat themselves, and there most guesses are right.
"""

from __future__ import annotations

from collections.abc import Sequence

SHORTEST = 3  # tokens that must have been the same
LONGEST = 16  # tokens that are compared: more say little more
PLACES = 4  # earlier places that are compared, the latest first


class Drafts:
    """Finds the end of a text earlier in it. The text only grows."""

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._ends: dict[tuple[int, ...], list[int]] = {}  # SHORTEST tokens -> where they ended, the latest last

    def add(self, ids: Sequence[int]) -> None:
        """Appends tokens to the text."""
        for token in ids:
            self._note()
            self._ids.append(token)

    def __len__(self) -> int:
        return len(self._ids)

    def draft(self, count: int) -> tuple[list[int], int]:
        """Up to ``count`` tokens that may come next, and how many tokens before them were the same, up to LONGEST. The
        longest match counts, and of equal ones the latest."""
        ids = self._ids
        best, end = 0, 0
        for place in reversed(self._ends.get(tuple(ids[-SHORTEST:]), ())):
            same = SHORTEST
            while same < LONGEST and same < place and ids[place - 1 - same] == ids[-1 - same]:
                same += 1
            if same > best:
                best, end = same, place
        return ids[end : end + count] if best else [], best

    def _note(self) -> None:
        """Notes where the last SHORTEST tokens ended. The end itself is no place, so this runs before the next one."""
        if len(self._ids) >= SHORTEST:
            places = self._ends.setdefault(tuple(self._ids[-SHORTEST:]), [])
            places.append(len(self._ids))
            del places[:-PLACES]
