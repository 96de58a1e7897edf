"""Counters of an engine since its start, as plain numbers that any thread may read at any time.

Only the thread that steps the engine changes them, so they need no lock. Counting a token takes about two microseconds.
The server publishes the counters at /metrics (server/metrics.py).
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .request import Request

SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)  # seconds between two tokens
LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0)  # seconds of a request
OUTCOMES = ("stop", "length", "abort", "error")


class Histogram:
    """The number of values between each two bounds, for a histogram of Prometheus."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)  # of the values between two bounds; the last one has no upper bound
        self.sum = 0.0

    def note(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def add(self, other: Histogram) -> None:
        self.counts = [mine + its for mine, its in zip(self.counts, other.counts, strict=True)]
        self.sum += other.sum


class Counts:
    """Tokens, times and outcomes of requests. All counters only grow; ``busy_since`` is not a counter."""

    def __init__(self) -> None:
        self.prompt_tokens = 0  # of requests that have started; a prompt with n completions counts once
        self.looked_up = 0  # prompt tokens that were looked up in the cache
        self.found = 0  # prompt tokens that the cache still had
        self.generated = 0  # tokens
        self.preempted = 0  # how often a request lost its pages
        self.drafted = 0  # tokens that speculation guessed
        self.accepted = 0  # drafted tokens that were right
        self.outcomes = dict.fromkeys(OUTCOMES, 0)  # of requests
        self.queued = Histogram(LONG)  # seconds from a request's arrival to its start
        self.first_token = Histogram(LONG)  # seconds from a request's arrival to its first token
        self.between_tokens = Histogram(SHORT)  # seconds between two tokens; near 0 for tokens of the same step
        self.whole = Histogram(LONG)  # seconds from a request's arrival to its end, without aborted and failed ones
        self.busy_since: float | None = None  # time.monotonic() of the last progress; None: the engine is idle

    def started(self, request: Request, is_looked_up: bool) -> None:
        """Counts a request that has got pages. A preempted request counts once."""
        if not request.has_started:
            request.has_started = True
            self.prompt_tokens += len(request.prompt_ids)
            if is_looked_up:
                self.looked_up += len(request.prompt_ids)
                self.found += request.num_found
            self.queued.note(time.monotonic() - request.arrived)

    def token(self, request: Request) -> None:
        """Counts a token of a request."""
        now = time.monotonic()
        self.generated += 1
        if request.last_token_at:
            self.between_tokens.note(now - request.last_token_at)
        else:
            self.first_token.note(now - request.arrived)
        request.last_token_at = now

    def ended(self, request: Request, outcome: str) -> None:
        """Counts the outcome of a request."""
        self.outcomes[outcome] += 1
        if outcome in ("stop", "length"):
            self.whole.note(time.monotonic() - request.arrived)

    def add(self, other: Counts) -> None:
        """Adds the counts of another engine."""
        for name, value in vars(other).items():
            mine = getattr(self, name)
            if isinstance(value, Histogram):
                mine.add(value)
            elif isinstance(value, dict):
                self.outcomes = {outcome: mine[outcome] + value[outcome] for outcome in OUTCOMES}
            elif name != "busy_since":
                setattr(self, name, mine + value)
