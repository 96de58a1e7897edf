"""Bounds the gap between two tokens of a stream while prompts are computed.

Chunks of prompts and decode steps alternate. While a stream decodes, the length of a chunk follows from the wanted gap
and from the speed of the last chunks. So the gap is about the wanted time plus a decode step, or the time for LEAST
tokens if this is longer. Lengths of chunks are powers of two, so that few different lengths occur.
"""

from __future__ import annotations

import time

LEAST = 64  # prompt tokens of a chunk; shorter chunks would read the weights too often


class Pace:
    """Determines the length of the next chunk of prompts. most: the largest length, in tokens. gap: in seconds."""

    def __init__(self, most: int, gap: float) -> None:
        self._most, self._gap = most, gap
        self._seconds = 0.0  # per prompt token; 0: not known yet
        self._unread = 0  # prompt tokens that were launched since the host last waited for a result
        self._since = 0.0

    def chunk(self) -> int:
        """The number of prompt tokens that may be computed before the next decode step."""
        if not self._seconds:
            return self._most
        tokens = max(LEAST, int(self._gap / self._seconds))
        return min(self._most, 1 << (tokens.bit_length() - 1))

    def begin(self, tokens: int) -> None:
        """Notes that a forward pass over this number of prompt tokens begins."""
        if not self._unread:
            self._since = time.monotonic()
        self._unread += tokens

    def read(self) -> None:
        """Notes that the host has read a result, so all launched passes are done. The time includes a decode step that
        ran in between, which makes chunks rather too short."""
        if self._unread:
            seconds = (time.monotonic() - self._since) / self._unread
            self._seconds += (seconds - self._seconds) / (4 if self._seconds else 1)
            self._unread = 0
