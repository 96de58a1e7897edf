"""How the engines on one model, of whatever thread, share the pages of its cache.

- A sequence starts when there is room for all of its tokens; until then its engine waits in line, first come, first
  served. What fits an empty cache is served.
- A sequence that grows into a full cache takes the pages of the one that started last, in whatever engine. That one
  waits in line, and its tokens are computed again when it goes on. So the one that started first always goes on.
- An engine is idle between two steps. It keeps its pages while nobody needs them. After PATIENCE, or at once where the
  thread that steps it is the one in need, they are taken, and its sequences wait in line at its next step.

An engine that has pages never waits, and an engine that waits has none, so nobody waits for ever. Pages change hands
under the cache's lock, between passes. Giving them back needs no lock.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Iterable

from ..cache import BlockTable, PagedCache
from .request import Request

PATIENCE = 0.1  # seconds; also how long a waiting engine sleeps at most before it looks again

_order = itertools.count()


class Share:
    """One engine's share of the cache: its requests that have pages, and its place in line."""

    def __init__(self, cache: PagedCache) -> None:
        self.cache = cache
        self.running: dict[Request, None] = {}  # in the order they started
        self._ticket: int | None = None  # the place in line
        self._thread = 0  # that made the last step
        self._idle_since: float | None = None  # the end of the last step; None while one is made
        self._gate = threading.Lock()  # closed while locked
        self._gate.acquire()

    def begin_step(self) -> None:
        self._idle_since = None
        self.cache.shares[self] = None

    def end_step(self) -> None:
        self._thread, self._idle_since = threading.get_ident(), time.monotonic()
        if not self.running and self._ticket is None:
            self.cache.shares.pop(self, None)

    def start(self, holder: Request, num_tokens: int) -> bool:
        """Starts a request that waits, with room for ``num_tokens``, or takes a place in line. Under the lock. Raises
        RequestError where even an empty cache is too small."""
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
        """Starts a copy of a request with room for ``num_tokens`` more, if there are pages. Under the lock."""
        cache, length = self.cache, holder.table.length
        missing = -(-(length + num_tokens) // cache.page_size) - length // cache.page_size
        if not cache.has_room(max(1, missing)):  # one at least: its next token may need it
            return False
        self._enter(copy)
        cache.fork(holder.table, copy.table)
        cache.extend(copy.table, num_tokens)
        return True

    def missing(self) -> int:
        """Pages that the next token of every running request needs."""
        return sum(self.cache.missing_pages(holder.table, 1) for holder in self.running)

    def find(self, num_pages: int) -> bool:
        """Whether so many pages are free, if need be from engines that are idle. Under the lock."""
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
        """Takes the pages of the request that started last, in whatever engine. Under the lock."""
        self.cache.release(max(self._holders(self.cache.shares), key=_start_of).table)

    def lost(self) -> list[Request]:
        """Running requests whose pages were taken. They run no longer. Under the lock."""
        lost = [holder for holder in self.running if not self.cache.holds(holder.table)]
        for holder in lost:
            holder.table = BlockTable()
            self.running.pop(holder, None)
        return lost

    def end(self, holder: Request) -> None:
        """Gives the pages of a running request back."""
        self.cache.release(holder.table)
        self.running.pop(holder, None)  # another thread may have ended it, too
        self._wake_others()

    def wait(self) -> None:
        """Until pages came back, or PATIENCE is over. Without the lock."""
        self._gate.acquire(timeout=PATIENCE)

    def leave_line(self) -> None:
        self._ticket = None
        self._wake_others()

    def give_all_back(self) -> None:
        """Takes no lock, see Scheduler.close."""
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
                with contextlib.suppress(RuntimeError):  # another one was faster
                    share._gate.release()

    def _is_next(self) -> bool:
        """Whether nobody has waited longer."""
        tickets = [share._ticket for share in list(self.cache.shares) if share is not self and not share._is_idle()]
        return all(ticket is None or (self._ticket is not None and self._ticket < ticket) for ticket in tickets)

    def _holders(self, shares: Iterable[Share]) -> list[Request]:
        return [each for share in list(shares) for each in list(share.running) if self.cache.holds(each.table)]

    def _is_idle(self) -> bool:
        """Whether nobody has stepped this engine for long, or, being who asks, for as long as it waits."""
        since = self._idle_since
        return since is not None and (self._thread == threading.get_ident() or time.monotonic() - since > PATIENCE)


def _start_of(holder: Request) -> int:
    return holder.started
