"""Decides which requests run in the next step, and with which tokens.

    arrivals ─► waiting, in order ─► running ─┬─ a chunk of prompts ─┐  alternately
                    ▲                         └─ the next tokens ◄───┘
                    └── preempted: the cache was full ──┘

Requests start in order, as soon as the cache has room for their tokens. If the cache is full while the running requests
grow, the last one in order is preempted: it loses its pages and waits again. When it starts again, its tokens are
computed again, except those whose pages the cache still has. The first request in order always continues.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..cache import PagedCache
from .counts import Counts
from .pace import Pace
from .request import Request, with_siblings

MAX_BATCH = 64  # sequences that decode together
FEW = 64  # so few aborted requests are not removed from the queue
PRIORITY = 10.0  # a request with priority 1 higher starts first if it arrives up to so many seconds later


@dataclass(frozen=True)
class Limits:
    """The limits of one step.

    ``batch_invariant`` guarantees that neither the other requests of a batch nor the content of the cache change a bit
    of a request's results. Prompts are then computed one at a time, in chunks that start at multiples of the chunk's
    length, and only whole chunks are found in the cache. A request starts when the cache has room for all the tokens
    that it may get, so it is never preempted. The ops guarantee this for up to ``max_batch`` sequences."""

    prefill_chunk: int  # prompt tokens
    max_batch: int = MAX_BATCH  # rows of logits; the siblings of a prompt count too
    batch_invariant: bool = False
    finds_prefixes: bool = True  # whether pages of earlier texts are used again
    stream_gap: float = 0.25  # seconds for prompts between two tokens of a stream (pace.py)
    speculated_rows: int = 0  # most rows of a decode step with drafts (speculation.py); 0: no speculation


class Scheduled(NamedTuple):
    """The tokens that a step computes for one request."""

    request: Request
    ids: list[int]


class Scheduler:
    """The waiting and the running requests of an engine."""

    def __init__(self, cache: PagedCache, limits: Limits, weights_version: Callable[[], int]) -> None:
        self.cache = cache
        self.limits = limits
        self.counts = Counts()
        self._weights_version = weights_version
        self.pace = Pace(limits.prefill_chunk, limits.stream_gap)
        self._count = itertools.count()  # orders requests that arrive at the same time
        # In batch-invariant mode only whole chunks are found in the cache, and a chunk begins with a page.
        self._unit = math.lcm(limits.prefill_chunk, cache.page_size) if limits.batch_invariant else cache.page_size
        self.running: dict[Request, None] = {}  # those that have pages, in the order of their start
        self._shortest_first = True  # the order of the last chunk of prompts
        self.reset()

    def reset(self) -> None:
        """Forgets all requests. Their pages are not freed."""
        self.running.clear()
        self._waiting: list[tuple[float, int, Request]] = []  # a heap
        self._arrivals: deque[Request] = deque()  # added since the last step, by any thread
        self._aborted: deque[Request] = deque()  # aborted since the last step, by any thread
        self._num_left = 0  # requests that were aborted while they waited, and may still be in the queue
        self._read_a_prompt = False  # whether the last step computed prompts
        self._refused: tuple[Request, int] | None = None  # the first that waits, and the free pages that were too few

    @property
    def has_requests(self) -> bool:
        return bool(self._arrivals or self._waiting or self.running)

    @property
    def num_waiting(self) -> int:
        """Requests that have not started, or were preempted. Aborted ones count until they are out of the queue."""
        return len(self._arrivals) + len(self._waiting)

    def add(self, *requests: Request) -> None:
        """Adds requests; the next step sees all of them. Any thread may call this."""
        now = time.monotonic()
        for request in with_siblings(requests):
            request.arrived = request.arrived or now
        self._arrivals.extend(requests)  # in one call, so that the batch does not depend on the threads' timing

    def abort(self, request: Request) -> None:
        """Ends a request before the next step. Any thread may call this. Other completions of its prompt continue."""
        self._aborted.append(request)  # before the flag is set, because an interrupt may come in between
        request.aborted = True

    def schedule(self) -> list[Scheduled]:
        """The tokens that the next step computes. Empty if there are no requests."""
        self._drop_aborted()
        while self._arrivals:
            self._wait(self._arrivals.popleft())
        self._admit()
        decoding = [each for each in self.running if each.num_pending == 1 and not each.on_logits]
        if not (decoding and self._read_a_prompt) and (chosen := self._prompts(decoding)):
            self._read_a_prompt = True
            return chosen
        self._read_a_prompt = False
        return self._next_tokens(decoding)

    def goes_on(self, requests: Sequence[Request]) -> bool:
        """Whether the next step computes one more token of exactly these requests, without a new decision."""
        if self._arrivals or self._aborted or len(self.running) != len(requests):
            return False
        if any(request.has_ended for request in requests):
            return False
        return self.cache.has_room(self._missing(requests))

    def fork(self, request: Request) -> list[Request]:
        """Starts the siblings of a request whose prompt is in the cache. Returns the request and the started siblings.
        Siblings without room wait; the first of them then starts the others."""
        siblings, request.siblings = deque(each for each in request.siblings if not each.aborted), []
        started, cache = [request], self.cache
        while siblings and len(self.running) < self.limits.max_batch:
            sibling = siblings[0]
            to_come = max(1, sibling.max_tokens - 1 if self.limits.batch_invariant else 0)
            length = request.table.length
            if not cache.has_room(-(-(length + to_come) // cache.page_size) - length // cache.page_size):
                break
            cache.fork(request.table, sibling.table)
            cache.extend(sibling.table, to_come)
            self.running[sibling] = None
            started.append(siblings.popleft())
        self._wait_together(siblings, request.arrived)
        return started

    def remember(self, request: Request) -> None:
        """Lets later requests find the full pages of a request."""
        known = len(request.prompt_ids) + (0 if self.limits.batch_invariant else len(request.output_ids))
        known = min(known, request.table.length) // self._unit * self._unit
        if self.limits.finds_prefixes and known > request.table.num_indexed * self.cache.page_size:
            self.cache.remember(request.table, (request.prompt_ids + request.output_ids)[:known])

    def end(self, request: Request, is_sound: bool = True) -> None:
        """Frees the pages of a running request. is_sound: whether their content is right, so that later requests may
        find them."""
        if request in self.running:
            if is_sound:
                self.remember(request)
            self.cache.release(request.table)
            del self.running[request]

    def drop_all(self) -> list[Request]:
        """Drops all requests. Returns those that had not ended."""
        self._drop_aborted()
        running, waiting = list(self.running), [request for _, _, request in sorted(self._waiting)]
        dropped = with_siblings([*running, *waiting, *self._arrivals])
        for request in running:
            self.cache.release(request.table)
        self.reset()
        return [request for request in dropped if not request.has_ended]

    def _wait(self, request: Request) -> None:
        heapq.heappush(self._waiting, (_place(request), next(self._count), request))

    def _wait_together(self, siblings: Sequence[Request], arrived: float) -> None:
        """Queues completions of one prompt: the first one, with the others as its siblings."""
        if siblings:
            first, *first.siblings = siblings
            first.arrived = arrived
            self._wait(first)

    def _drop_aborted(self) -> None:
        """Frees the pages of aborted requests. A waiting one stays in the queue until it is the first, or until many
        are aborted, because the queue does not move while the first request has no room."""
        while self._aborted:
            request = self._aborted.popleft()
            request.aborted = True
            if request.finish_reason is None and request.error is None:
                self.counts.ended(request, "abort")
            if request in self.running:
                self.end(request)
                self._leave_siblings(request)
            else:
                self._num_left += 1
        if self._num_left > max(FEW, len(self._waiting) // 2):
            self._num_left = 0
            gone = [request for _, _, request in self._waiting if request.aborted]
            self._waiting = [each for each in self._waiting if not each[2].aborted]
            heapq.heapify(self._waiting)
            for request in gone:
                self._leave_siblings(request)

    def _leave_siblings(self, request: Request) -> None:
        siblings, request.siblings = [each for each in request.siblings if not each.aborted], []
        self._wait_together(siblings, request.arrived)

    def _admit(self) -> None:
        """Starts waiting requests in order, as long as the cache has room for all of their tokens."""
        while self._waiting:
            _, _, request = self._waiting[0]
            if request.aborted:
                heapq.heappop(self._waiting)
                self._leave_siblings(request)
                continue
            rows = sum(1 + len(each.siblings) for each in (*self.running, request))
            if (self.running and rows > self.limits.max_batch) or not self._start(request):
                return
            heapq.heappop(self._waiting)
            self.running[request] = None
            self._refused = None

    def _start(self, request: Request) -> bool:
        """Gives a request the cached pages with the beginning of its tokens, and free pages for the rest. Returns
        whether there was room."""
        free = self.cache.num_free_pages
        if self._refused and self._refused[0] is request and self._refused[1] >= free:
            return False
        ids = request.prompt_ids + request.output_ids
        to_come = 0
        if self.limits.batch_invariant and not request.on_logits:
            to_come = request.max_tokens - len(request.output_ids) - 1  # the last token is never cached
        found = []
        if self.limits.finds_prefixes and not request.on_logits:
            self.cache.forget_if_changed(self._weights_version())
            found = self.cache.find(ids[: len(ids) - 1], request.table.salt)  # at least one token is computed
            del found[len(found) * self.cache.page_size // self._unit * self._unit // self.cache.page_size :]
        if not self.cache.begin(request.table, found, len(ids) + to_come):
            assert self.running, f"a request of {len(ids) + to_come} tokens does not fit the empty cache"
            self._refused = request, free
            return False
        if not request.output_ids:
            request.num_found = request.table.length
        self.counts.started(request, self.limits.finds_prefixes and not request.on_logits)
        return True

    def _prompts(self, decoding: list[Request]) -> list[Scheduled]:
        """A chunk of the prompts that are not computed yet. Every other chunk takes the prompts in order; the chunks in
        between begin with the prompt that has the fewest tokens left. So a short prompt does not wait for a long one,
        and the long one keeps at least half of its speed. A prompt whose logits are all requested is computed by
        itself, because it has many rows of logits. In batch-invariant mode every prompt is computed by itself."""
        scheduled: list[Scheduled] = []
        self._shortest_first = not self._shortest_first
        place = _place_of_short if self._shortest_first else _place
        is_invariant = self.limits.batch_invariant
        watched = not is_invariant and any(request.is_streamed for request in decoding)
        budget = self.pace.chunk() if watched else self.limits.prefill_chunk
        for request in sorted(filter(_is_read, self.running), key=place):
            if scheduled and request.on_logits:
                continue
            scheduled.append(Scheduled(request, request.pending_ids(budget)))
            budget -= len(scheduled[-1].ids)
            if not budget or request.on_logits or is_invariant:
                break
        return scheduled

    def _next_tokens(self, decoding: list[Request]) -> list[Scheduled]:
        """The next token of every request that decodes. If the cache is full, others are preempted until they have
        room."""
        while not self.cache.has_room(self._missing(decoding)):
            last = max(self.running, key=_place)
            self._preempt(last)
            decoding = [request for request in decoding if request is not last]
        return [Scheduled(request, request.pending_ids(1)) for request in decoding]

    def _missing(self, requests: Sequence[Request]) -> int:
        """The number of pages that the next tokens of the requests need."""
        return sum(self.cache.missing_pages(request.table, 1) for request in requests)

    def _preempt(self, request: Request) -> None:
        self.counts.preempted += 1
        self.end(request)
        self._wait(request)


def _place(request: Request) -> float:
    """The sort key of a request in the order."""
    return request.arrived - PRIORITY * request.params.priority


def _place_of_short(request: Request) -> tuple[float, int, float]:
    """The sort key of a request by priority, then by the length of its prompt's rest."""
    return -request.params.priority, request.num_pending, request.arrived


def _is_read(request: Request) -> bool:
    """Whether a part of a running request's prompt is not computed yet."""
    return request.num_pending > 1 or request.on_logits is not None
