"""Guesses the next tokens of texts with a smaller model of the same family, which decodes them greedily, one by one.

    text (known to both models) ─► small model ─► d1 ─► d2 ─► d3          one forward pass of the small model each
                                                   │     │     │
                                   the large model verifies them together (speculation.py)

The small model has a key-value cache of its own. After wrong guesses it continues from the last token that was right.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from ..cache import BlockTable
from .request import Request
from .runner import Runner

SMOOTHING = 1 / 8  # weight of the latest decode step in the average time of one


class DraftModel:
    """A small model as a source of drafts. Its cache should hold as many tokens as that of the large one."""

    def __init__(self, runner: Runner, chunk: int) -> None:
        self._runner, self._chunk = runner, chunk
        self._read: dict[Request, Reader] = {}
        self.seconds = 0.0  # of a decode step; 0: not measured yet

    def draft(self, wanted: Mapping[Request, int]) -> dict[Request, list[int]]:
        """The wanted number of tokens that may come next, for each request. Requests that the small model's cache has
        no room for are left out."""
        cache = self._runner.cache
        for request in [each for each in self._read if each.has_ended]:
            cache.release(self._read.pop(request).table)
        found: dict[Request, list[int]] = {}
        for request, count in wanted.items():
            reader = self._read.setdefault(request, Reader())
            reader.follow(request.prompt_ids + request.output_ids)
            if cache.has_room(cache.missing_pages(reader.table, len(reader.pending) + count)):
                cache.extend(reader.table, len(reader.pending) + count)
                found[request] = []
        while going := [request for request in found if len(found[request]) < wanted[request]]:
            readers = [self._read[request] for request in going]
            parts = [(reader.table, reader.pending[: self._chunk]) for reader in readers]
            is_decode = all(len(ids) == 1 for _, ids in parts)
            ends = [sum(len(ids) for _, ids in parts[: at + 1]) - 1 for at in range(len(parts))]
            begin = time.monotonic()
            tokens = self._runner.logits(parts, ends, captured=is_decode).argmax(-1).tolist()
            if is_decode:
                self._note(time.monotonic() - begin)
            for request, reader, (_, ids), token in zip(going, readers, parts, tokens, strict=True):
                reader.has_read(len(ids))
                if not reader.pending:
                    found[request].append(token)
                    reader.guess(token)
        return found

    def _note(self, seconds: float) -> None:
        if not self.seconds:
            self.seconds = seconds
        self.seconds += SMOOTHING * (min(seconds, 2 * self.seconds) - self.seconds)


class Reader:
    """The tokens of a text that the small model has computed, and those that it must compute next."""

    def __init__(self) -> None:
        self.table = BlockTable()
        self.pending: list[int] = []  # tokens that are not in the cache yet
        self._known = 0  # tokens of the text at the last call
        self._guesses: list[int] = []  # guessed tokens that follow the known ones

    def follow(self, text: list[int]) -> None:
        """Continues with a text that begins with the last one. Guesses that were right are not computed again."""
        right, came = 0, text[self._known :]
        while right < min(len(self._guesses), len(came)) and self._guesses[right] == came[right]:
            right += 1
        self.table.length = min(self.table.length, self._known + right, len(text) - 1)
        self.pending = text[self.table.length :]
        self._known, self._guesses = len(text), []

    def has_read(self, count: int) -> None:
        del self.pending[:count]

    def guess(self, token: int) -> None:
        self._guesses.append(token)
        self.pending = [token]
