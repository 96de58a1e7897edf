"""Whose turn it is: how all calls on a model, of whatever thread, share the pages of its cache.

- A sequence starts when there is room for all of its tokens; until then its call waits in line, first come, first
  served. Whoever fits an empty cache is served.
- A sequence that grows into a full cache takes the pages of the one that started last, in whatever call: that one
  waits in line, and computes its tokens again when it goes on. So the one that started first always goes on.
- A stream may be open and read by nobody. It keeps its pages while nobody needs them. After PATIENCE, or at once where
  the thread that reads it is the one in need, they are taken, and it waits in line when it is read again.

A call that has pages never waits, and a call that waits has none, so nobody waits for ever. Pages change hands under
the cache's lock, between passes. Giving them back needs no lock.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable
from typing import Protocol, TypeVar

from ..cache import BlockTable, PagedCache

PATIENCE = 0.1  # seconds; also how long a waiting call sleeps at most before it looks again

_order = itertools.count()
T = TypeVar("T")


class Holder(Protocol):
    """What has pages: a sequence."""

    table: BlockTable
    started: int  # a number that grows from start to start


class Call:
    """One call on a model: its sequences that have pages, and those that wait for them."""

    def __init__(self, cache: PagedCache, sequences: Iterable[Holder]) -> None:
        self.cache = cache
        self.waiting: deque[Holder] = deque(sequences)
        self.running: list[Holder] = []  # in the order they started
        self._ticket: int | None = None  # its place in line
        self._thread = 0  # that read it last
        self._idle_since: float | None = None  # while its reader does something else
        self._gate = threading.Lock()  # closed while locked
        self._gate.acquire()

    def serve(self, tokens: Iterable[T]) -> Generator[T, None, None]:
        """Yields what the call computes; when that ends, in whatever way, its pages go back."""
        try:
            try:
                self.cache.calls[self] = None
                for token in tokens:
                    self._thread, self._idle_since = threading.get_ident(), time.monotonic()
                    yield token
                    self._idle_since = None
            finally:
                self._leave()
        finally:
            self._leave()  # a second interrupt may have struck the first

    def start(self, num_tokens: int) -> bool:
        """Starts the first sequence that waits, with room for ``num_tokens``, or takes a place in line. Under the
        lock. Raises RequestError where even an empty cache is too small."""
        cache, sequence = self.cache, self.waiting[0]
        missing = cache.missing_pages(sequence.table, num_tokens)
        if missing <= cache.num_pages and not (self._is_next() and self._find(missing)):
            if self._ticket is None:
                self._ticket = next(_order)
            return False
        self._start(sequence)
        cache.extend(sequence.table, num_tokens)
        self.waiting.popleft()
        if self._ticket is not None:
            self.leave_line()
        return True

    def fork(self, sequence: Holder, copy: Holder, num_tokens: int) -> bool:
        """Starts a copy of a sequence with room for ``num_tokens`` more, if there are pages. Under the lock."""
        cache, length = self.cache, sequence.table.length
        missing = -(-(length + num_tokens) // cache.page_size) - length // cache.page_size
        if not cache.has_room(max(1, missing)):  # one at least: its next token may need it
            return False
        self._start(copy)
        cache.fork(sequence.table, copy.table)
        cache.extend(copy.table, num_tokens)
        return True

    def grow(self) -> None:
        """Makes room for the next token of every running sequence, or stops some. Under the lock."""
        while not self._find(self.missing()):
            self.cache.release(max(self._holders(self.cache.calls), key=_start_of).table)
            self.take_back()

    def missing(self) -> int:
        """Pages that the next token of every running sequence needs."""
        return sum(self.cache.missing_pages(sequence.table, 1) for sequence in self.running)

    def take_back(self) -> None:
        """Puts sequences that have lost their pages in front of those that wait. Under the lock."""
        lost = [sequence for sequence in self.running if not self.cache.holds(sequence.table)]
        for sequence in reversed(lost):
            sequence.table = BlockTable()
            self.running.remove(sequence)
            self.waiting.appendleft(sequence)

    def end(self, sequence: Holder) -> None:
        """Gives the pages of a running sequence back."""
        self.cache.release(sequence.table)
        self.running.remove(sequence)
        self._wake()

    def wait(self) -> None:
        """Until pages came back, or PATIENCE is over. Without the lock."""
        self._gate.acquire(timeout=PATIENCE)

    def leave_line(self) -> None:
        self._ticket = None
        self._wake()

    def _start(self, sequence: Holder) -> None:
        sequence.started = next(_order)
        self.running.append(sequence)

    def _leave(self) -> None:
        """Not under the lock: the garbage collector may close a stream in the middle of anything."""
        self.cache.calls.pop(self, None)
        for sequence in self.running:
            self.cache.release(sequence.table)
        self.cache.recount()
        self._wake()

    def _wake(self) -> None:
        for call in list(self.cache.calls):
            if call._ticket is not None and call._gate.locked():
                with contextlib.suppress(RuntimeError):  # another one was faster
                    call._gate.release()

    def _is_next(self) -> bool:
        """Whether nobody has waited longer."""
        tickets = [call._ticket for call in list(self.cache.calls) if call is not self and not call._sleeps()]
        return all(ticket is None or (self._ticket is not None and self._ticket < ticket) for ticket in tickets)

    def _find(self, pages: int) -> bool:
        """Whether so many pages are free, if need be from calls that sleep."""
        cache = self.cache
        if cache.has_room(pages):
            return True
        others = [call for call in list(cache.calls) if call is not self and call._sleeps()]
        asleep = sorted(self._holders(others), key=_start_of)
        if pages > cache.num_free_pages + sum(len(sequence.table.pages) for sequence in asleep):
            return False
        while asleep and not cache.has_room(pages):
            cache.release(asleep.pop().table)
        return cache.has_room(pages)

    def _holders(self, calls: Iterable[Call]) -> list[Holder]:
        return [each for call in list(calls) for each in list(call.running) if self.cache.holds(each.table)]

    def _sleeps(self) -> bool:
        """Whether its reader does something else for long, or, being who asks, for as long as it waits."""
        since = self._idle_since
        return since is not None and (self._thread == threading.get_ident() or time.monotonic() - since > PATIENCE)


def _start_of(sequence: Holder) -> int:
    return sequence.started
