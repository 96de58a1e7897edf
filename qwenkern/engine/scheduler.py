"""Who runs in the next pass.

Prompts first, a chunk of them at a time; then one token of every running request. A request starts, in order, when the
cache has room for its tokens. One that loses its pages to another (sharing.py) waits in front of the others, and starts
again from its tokens.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from ..cache import PagedCache
from .request import Request
from .sharing import Share

MAX_BATCH = 64  # sequences that decode together


@dataclass(frozen=True)
class Limits:
    """What one pass may hold.

    ``batch_invariant`` is the promise that a request's bits do not depend on the others in its batch. Prompts are then
    read one at a time, and a request starts when the cache has room for all of it, so that it keeps its pages. Only one
    that nobody steps can lose them; what it decoded is then decoded again, token by token, for the same bits. The ops
    keep their part of the promise up to ``max_batch``."""

    prefill_chunk: int  # prompt tokens
    max_batch: int = MAX_BATCH  # rows of logits: requests, and completions of the same prompt that start with them
    batch_invariant: bool = False


class Scheduled(NamedTuple):
    """The tokens of one request that a pass computes."""

    request: Request
    ids: list[int]


class Scheduler:
    """The requests of one engine: those that wait and those that run."""

    def __init__(self, cache: PagedCache, limits: Limits) -> None:
        self.limits = limits
        self.share = Share(cache)
        self.waiting: deque[Request] = deque()
        self._arrivals: deque[Request] = deque()  # since the last pass, from any thread

    @property
    def running(self) -> list[Request]:
        """Those that have pages, in the order they started."""
        return list(self.share.running)

    @property
    def has_requests(self) -> bool:
        return bool(self._arrivals or self.waiting or self.share.running)

    def add(self, request: Request) -> None:
        """From any thread."""
        self._arrivals.append(request)

    def schedule(self) -> list[Scheduled]:
        """What the next pass computes; nothing where all requests wait for room. Under the cache's lock."""
        self._sort()
        self._admit()
        return self._to_score() or self._prompts() or self._next_tokens()

    def goes_on(self, requests: list[Request]) -> bool:
        """Whether the next pass is one more token of just these requests, without any decision. Under the lock."""
        if self._arrivals or any(request.has_ended for request in requests):
            return False
        share = self.share
        return all(map(share.cache.holds, (each.table for each in requests))) and share.cache.has_room(share.missing())

    def fork(self, request: Request) -> list[Request]:
        """The request, whose prompt is in the cache, and its siblings that start there. Siblings that find no room
        wait, and the first of them starts the others. Under the lock."""
        siblings, request.siblings = deque(each for each in request.siblings if not each.aborted), []
        started = [request]
        while siblings and len(self.share.running) < self.limits.max_batch:
            to_come = siblings[0].max_tokens - 1 if self.limits.batch_invariant else 0
            if not self.share.fork(request, siblings[0], to_come):
                break
            started.append(siblings.popleft())
        self.waiting.extendleft(_led_by_first(siblings))
        return started

    def end(self, request: Request) -> None:
        """Gives the pages of a request back, which has had its last token."""
        self.share.end(request)

    def abort(self, request: Request) -> None:
        """Drops a request that runs or waits, and gives its pages back. The completions of its prompt that have not
        started go on without it. Under the lock."""
        if request in self.share.running:
            at = 0
            self.share.end(request)
        elif request in self.waiting:
            at = self.waiting.index(request)
            self.waiting.remove(request)
        else:  # it has just arrived, or waits for its prompt: it is dropped when it comes to its turn
            return
        for heir in _led_by_first(request.siblings):
            self.waiting.insert(at, heir)
        request.siblings = []

    def close(self) -> None:
        """Drops all requests. Takes no lock: the garbage collector may close a stream in the middle of anything."""
        self.share.give_all_back()
        self._arrivals.clear()
        self.waiting.clear()

    def _sort(self) -> None:
        """Takes in who arrived, drops who was aborted, and lets those wait that have lost their pages."""
        while self._arrivals:
            self.waiting.append(self._arrivals.popleft())
        for request in [each for each in [*self.waiting, *self.share.running] if each.aborted]:
            self.abort(request)
        self.waiting.extendleft(reversed(self.share.lost()))

    def _admit(self) -> None:
        """Starts waiting requests, in order, while there is room for all of their tokens."""
        while self.waiting:
            request = self.waiting[0]
            rows = sum(1 + len(each.siblings) for each in [*self.share.running, request])
            if self.share.running and rows > self.limits.max_batch:
                self.share.leave_line()
                return
            to_come = 0
            if self.limits.batch_invariant and not request.wants_logits:
                to_come = request.max_tokens - len(request.output_ids) - 1  # the last one is never cached
            if not self.share.start(request, len(request.pending_ids) + to_come):
                return
            self.waiting.popleft()

    def _to_score(self) -> list[Scheduled]:
        """A chunk of a prompt whose logits are all asked for: by itself, since it has so many rows of them."""
        for request in self.share.running:
            if request.wants_logits:
                return [Scheduled(request, request.pending_ids[: self.limits.prefill_chunk])]
        return []

    def _prompts(self) -> list[Scheduled]:
        """A chunk of unfinished prompts."""
        scheduled: list[Scheduled] = []
        budget = self.limits.prefill_chunk
        for request in self.share.running:
            pending = request.pending_ids
            if self.limits.batch_invariant and len(pending) > 1:  # what was decoded at first is decoded again
                pending = pending[: max(1, len(request.prompt_ids) - request.num_cached)]
            if len(pending) > 1 and budget and not (self.limits.batch_invariant and scheduled):
                scheduled.append(Scheduled(request, pending[:budget]))
                budget -= len(scheduled[-1].ids)
        return scheduled

    def _next_tokens(self) -> list[Scheduled]:
        """The next token of every running request. Where the cache is full, some are preempted."""
        while not self.share.find(self.share.missing()):
            self.share.preempt_latest()
            self.waiting.extendleft(reversed(self.share.lost()))
        return [Scheduled(request, request.pending_ids[:1]) for request in self.share.running]


def _led_by_first(siblings: deque[Request] | list[Request]) -> list[Request]:
    """The first of some completions of a prompt, with the others as its siblings; nothing of none."""
    if not siblings:
        return []
    first, *first.siblings = siblings
    return [first]
