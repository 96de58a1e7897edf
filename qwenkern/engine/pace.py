"""Bounds the gap between two tokens of a stream while prompts are read.

Prompts and decode steps take turns. While a stream decodes, a chunk of prompts is only as long as can be read in the
wanted gap, by the speed that the last chunks had. So the gap is about that time and a decode step, or the time for
LEAST tokens if they take longer. Chunks are powers of two, so that few different ones occur.
"""

from __future__ import annotations

import time

LEAST = 64  # prompt tokens of a chunk; shorter ones would read the weights too often


class Pace:
    """The length of the next chunk of prompts. most: tokens. gap: seconds."""

    def __init__(self, most: int, gap: float) -> None:
        self._most, self._gap = most, gap
        self._seconds = 0.0  # for a prompt token; 0: not known yet
        self._unread = 0  # prompt tokens whose passes were launched since the host last waited for a result
        self._since = 0.0

    def chunk(self) -> int:
        """Prompt tokens that may be read before the next decode step."""
        if not self._seconds:
            return self._most
        tokens = max(LEAST, int(self._gap / self._seconds))
        return min(self._most, 1 << (tokens.bit_length() - 1))

    def begin(self, tokens: int) -> None:
        """Notes that a pass over so many prompt tokens begins."""
        if not self._unread:
            self._since = time.monotonic()
        self._unread += tokens

    def read(self) -> None:
        """Notes that the host has read a result, so all passes are done. A decode step that ran in between counts too,
        which errs to shorter chunks."""
        if self._unread:
            seconds = (time.monotonic() - self._since) / self._unread
            self._seconds += (seconds - self._seconds) / (4 if self._seconds else 1)
            self._unread = 0
