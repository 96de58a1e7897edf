"""Shares the pages of one cache among the engines of a model, which may run in different threads.

- A sequence starts when there is room for all of its tokens. Until then its engine waits in line, first come, first
  served. Every sequence that fits an empty cache starts eventually.
- If a sequence grows and the cache is full, the sequence that started last, in whatever engine, is preempted: it loses
  its pages and waits in line. Its tokens are computed again when it restarts. The sequence that started first always
  continues.
- An engine is idle between two steps. It keeps its pages while no other engine needs them. Another engine may take them
  after PATIENCE seconds, or at once if the thread that steps the idle engine is the one that needs them. The sequences
  that lost their pages wait in line at their engine's next step.

An engine with pages never waits, and a waiting engine has no pages, so there is no deadlock. Pages change owners under
the cache's lock, between passes. Freeing pages needs no lock.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Iterable

from ..cache import BlockTable, PagedCache
from .request import Request

PATIENCE = 0.1  # seconds; also the longest time that a waiting engine sleeps between two looks

_order = itertools.count()


class Share:
    """One engine's share of the cache: its requests that have pages, and its place in line."""

    def __init__(self, cache: PagedCache) -> None:
        self.cache = cache
        self.running: dict[Request, None] = {}  # in the order of their start
        self._ticket: int | None = None  # the place in line
        self._thread = 0  # the thread that ran the last step
        self._idle_since: float | None = None  # the end of the last step; None during a step
        self._gate = threading.Lock()  # a waiting engine sleeps on it; _wake_others releases it
        self._gate.acquire()

    def begin_step(self) -> None:
        self._idle_since = None
        self.cache.shares[self] = None

    def end_step(self) -> None:
        self._thread, self._idle_since = threading.get_ident(), time.monotonic()
        if not self.running and self._ticket is None:
            self.cache.shares.pop(self, None)

    def start(self, holder: Request, num_tokens: int) -> bool:
        """Starts a waiting request with room for ``num_tokens``, or takes a place in line. Returns whether it started.
        The caller holds the cache's lock. Raises RequestError if even an empty cache is too small."""
        missing = self.cache.missing_pages(holder.table, num_tokens)
        if missing <= self.cache.num_pages and not (self._is_next() and self.find(missing)):
            if self._ticket is None:
                self._ticket = next(_order)
            return False
        self._enter(holder)
        self.cache.extend(holder.table, num_tokens)
        if self._ticket is not None:
            self.leave_line()
        return True

    def fork(self, holder: Request, copy: Request, num_tokens: int) -> bool:
        """Starts a copy of a request with room for ``num_tokens`` more, if there are pages. Returns whether it started.
        The caller holds the cache's lock."""
        cache, length = self.cache, holder.table.length
        missing = -(-(length + num_tokens) // cache.page_size) - length // cache.page_size
        if not cache.has_room(max(1, missing)):  # at least one page, for its next token
            return False
        self._enter(copy)
        cache.fork(holder.table, copy.table)
        cache.extend(copy.table, num_tokens)
        return True

    def missing(self) -> int:
        """The number of pages that the next tokens of all running requests need."""
        return sum(self.cache.missing_pages(holder.table, 1) for holder in self.running)

    def find(self, num_pages: int) -> bool:
        """Whether so many pages are free. Takes pages of idle engines if needed. The caller holds the cache's lock."""
        cache = self.cache
        if cache.has_room(num_pages):
            return True
        others = [share for share in list(cache.shares) if share is not self and share._is_idle()]
        idle = sorted(self._holders(others), key=_start_of)
        if num_pages > cache.num_free_pages + sum(len(holder.table.pages) for holder in idle):
            return False
        while idle and not cache.has_room(num_pages):
            cache.release(idle.pop().table)
        return cache.has_room(num_pages)

    def preempt_latest(self) -> None:
        """Preempts the request that started last, in whatever engine, and frees its pages. The caller holds the cache's
        lock."""
        self.cache.release(max(self._holders(self.cache.shares), key=_start_of).table)

    def lost(self) -> list[Request]:
        """Removes and returns the running requests whose pages were taken. The caller holds the cache's lock."""
        lost = [holder for holder in self.running if not self.cache.holds(holder.table)]
        for holder in lost:
            holder.table = BlockTable()
            self.running.pop(holder, None)
        return lost

    def end(self, holder: Request) -> None:
        """Frees the pages of a running request."""
        self.cache.release(holder.table)
        self.running.pop(holder, None)  # another thread may have ended it already
        self._wake_others()

    def wait(self) -> None:
        """Sleeps until pages are freed, or for PATIENCE seconds. The caller does not hold the cache's lock."""
        self._gate.acquire(timeout=PATIENCE)

    def leave_line(self) -> None:
        self._ticket = None
        self._wake_others()

    def give_all_back(self) -> None:
        """Frees all pages of this engine. Takes no lock, because the garbage collector may call it
        (Scheduler.close)."""
        self.cache.shares.pop(self, None)
        for holder in list(self.running):
            self.cache.release(holder.table)
        self.cache.recount()
        self.running.clear()
        self._ticket = None
        self._wake_others()

    def _enter(self, holder: Request) -> None:
        holder.started = next(_order)
        self.running[holder] = None

    def _wake_others(self) -> None:
        for share in list(self.cache.shares):
            if share._ticket is not None and share._gate.locked():
                with contextlib.suppress(RuntimeError):  # another thread has already released it
                    share._gate.release()

    def _is_next(self) -> bool:
        """Whether no other engine that is being stepped has waited longer."""
        tickets = [share._ticket for share in list(self.cache.shares) if share is not self and not share._is_idle()]
        return all(ticket is None or (self._ticket is not None and self._ticket < ticket) for ticket in tickets)

    def _holders(self, shares: Iterable[Share]) -> list[Request]:
        return [each for share in list(shares) for each in list(share.running) if self.cache.holds(each.table)]

    def _is_idle(self) -> bool:
        """Whether nobody has stepped this engine for PATIENCE seconds, or since its last step if the calling thread is
        the one that steps it."""
        since = self._idle_since
        return since is not None and (self._thread == threading.get_ident() or time.monotonic() - since > PATIENCE)


def _start_of(holder: Request) -> int:
    return holder.started
