"""Guesses the next tokens of a text from the text itself: the tokens that followed an earlier occurrence of its end.

    ... the quick brown fox jumps ...  ...  the quick brown ─► fox jumps
        └─────────────┘ the same tokens earlier   └ the end ┘    the draft

Edited code, quotations and lists repeat earlier text, and most of their guesses are right.
"""

from __future__ import annotations

from collections.abc import Sequence

SHORTEST = 3  # the least number of equal tokens
LONGEST = 16  # the largest number of compared tokens: a longer match hardly predicts better
PLACES = 4  # earlier places that are compared, the latest first


class Drafts:
    """Finds earlier occurrences of the end of a text. The text only grows."""

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
        """Up to ``count`` tokens that may come next, and the length of the match before them, up to LONGEST tokens. The
        longest match counts, and of equally long ones the latest."""
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
        """Notes where the last SHORTEST tokens end. This runs just before the next token is added, so that the end of
        the text does not match itself."""
        if len(self._ids) >= SHORTEST:
            places = self._ends.setdefault(tuple(self._ids[-SHORTEST:]), [])
            places.append(len(self._ids))
            del places[:-PLACES]
