"""Decides which requests run in the next pass, and with which tokens.

Prompts come first, one chunk in each pass. Then every running request decodes one token. Requests start in their order,
each when the cache has room for its tokens. A request that loses its pages to another one (sharing.py) waits in front
of the others. When it starts again, all its tokens are computed again.
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
    """The limits of one pass.

    ``batch_invariant`` promises that the other requests of a batch do not change a bit of a request's results. Prompts
    are then read one at a time. A request starts when the cache has room for all the tokens that it may get, so it
    keeps its pages. It can lose them only while nobody steps its engine; its decoded tokens are then computed again one
    by one, which gives the same bits. The ops keep this promise for up to ``max_batch`` sequences."""

    prefill_chunk: int  # prompt tokens
    max_batch: int = MAX_BATCH  # rows of logits; the siblings of a prompt count too
    batch_invariant: bool = False


class Scheduled(NamedTuple):
    """The tokens that a pass computes for one request."""

    request: Request
    ids: list[int]


class Scheduler:
    """The requests of one engine, waiting and running."""

    def __init__(self, cache: PagedCache, limits: Limits) -> None:
        self.limits = limits
        self.share = Share(cache)
        self.waiting: deque[Request] = deque()
        self._arrivals: deque[Request] = deque()  # added since the last pass, by any thread

    @property
    def running(self) -> list[Request]:
        """The requests that have pages, in the order of their start."""
        return list(self.share.running)

    @property
    def has_requests(self) -> bool:
        return bool(self._arrivals or self.waiting or self.share.running)

    def add(self, request: Request) -> None:
        """Adds a request. Any thread may call this."""
        self._arrivals.append(request)

    def schedule(self) -> list[Scheduled]:
        """The tokens that the next pass computes. Empty if all requests wait for room. The caller holds the cache's
        lock."""
        self._sort()
        self._admit()
        return self._to_score() or self._prompts() or self._next_tokens()

    def goes_on(self, requests: list[Request]) -> bool:
        """Whether the next pass computes one more token of exactly these requests, without a new decision. The caller
        holds the cache's lock."""
        if self._arrivals or any(request.has_ended for request in requests):
            return False
        share = self.share
        return all(map(share.cache.holds, (each.table for each in requests))) and share.cache.has_room(share.missing())

    def fork(self, request: Request) -> list[Request]:
        """Starts the siblings of a request whose prompt is in the cache. Returns the request and the started siblings.
        Siblings without room wait; the first of them then starts the others. The caller holds the cache's lock."""
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
        """Frees the pages of a request that has its last token."""
        self.share.end(request)

    def abort(self, request: Request) -> None:
        """Drops a running or waiting request and frees its pages. Completions of its prompt that have not started
        continue without it. The caller holds the cache's lock."""
        if request in self.share.running:
            at = 0
            self.share.end(request)
        elif request in self.waiting:
            at = self.waiting.index(request)
            self.waiting.remove(request)
        else:  # it has just arrived, or is another request's sibling: it is dropped at its turn
            return
        for heir in _led_by_first(request.siblings):
            self.waiting.insert(at, heir)
        request.siblings = []

    def close(self) -> None:
        """Drops all requests. Takes no lock, because the garbage collector may call it at any time."""
        self.share.give_all_back()
        self._arrivals.clear()
        self.waiting.clear()

    def _sort(self) -> None:
        """Queues new requests, drops aborted ones, and queues again those that lost their pages."""
        while self._arrivals:
            self.waiting.append(self._arrivals.popleft())
        for request in [each for each in [*self.waiting, *self.share.running] if each.aborted]:
            self.abort(request)
        self.waiting.extendleft(reversed(self.share.lost()))

    def _admit(self) -> None:
        """Starts waiting requests in order, while the cache has room for all of their tokens."""
        while self.waiting:
            request = self.waiting[0]
            rows = sum(1 + len(each.siblings) for each in [*self.share.running, request])
            if self.share.running and rows > self.limits.max_batch:
                self.share.leave_line()
                return
            to_come = 0
            if self.limits.batch_invariant and not request.wants_logits:
                to_come = request.max_tokens - len(request.output_ids) - 1  # the last token is never cached
            if not self.share.start(request, len(request.pending_ids) + to_come):
                return
            self.waiting.popleft()

    def _to_score(self) -> list[Scheduled]:
        """A chunk of a prompt whose logits are all requested. It runs by itself, because it has many rows of logits."""
        for request in self.share.running:
            if request.wants_logits:
                return [Scheduled(request, request.pending_ids[: self.limits.prefill_chunk])]
        return []

    def _prompts(self) -> list[Scheduled]:
        """A chunk of the prompts that are not computed yet."""
        scheduled: list[Scheduled] = []
        budget = self.limits.prefill_chunk
        for request in self.share.running:
            pending = request.pending_ids
            if self.limits.batch_invariant and len(pending) > 1:  # decoded tokens are decoded again, not prefilled
                pending = pending[: max(1, len(request.prompt_ids) - request.num_cached)]
            if len(pending) > 1 and budget and not (self.limits.batch_invariant and scheduled):
                scheduled.append(Scheduled(request, pending[:budget]))
                budget -= len(scheduled[-1].ids)
        return scheduled

    def _next_tokens(self) -> list[Scheduled]:
        """The next token of every running request. If the cache is full, requests are preempted until the others have
        room."""
        while not self.share.find(self.share.missing()):
            self.share.preempt_latest()
            self.waiting.extendleft(reversed(self.share.lost()))
        return [Scheduled(request, request.pending_ids[:1]) for request in self.share.running]


def _led_by_first(siblings: deque[Request] | list[Request]) -> list[Request]:
    """The first of some completions of a prompt, with the others as its siblings. Empty if there are none."""
    if not siblings:
        return []
    first, *first.siblings = siblings
    return [first]
