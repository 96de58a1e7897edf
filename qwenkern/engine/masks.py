"""Computes what grammars allow next while the pass runs that computes the logits.

    engine's thread:   begin ─► pass over the last tokens and drafts ─► finish ─► draw, accept
    another thread:        └─► a mask for each place of each text ──────┘

llguidance and numpy let other threads run meanwhile. A text's matcher belongs to the other thread from `begin` to
`finish`, else to the engine's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from .request import Request


class Masks:
    """The masks of the requests in a pass. The thread starts with the first grammar."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._process = 0  # a process that was forked has no thread
        self._work: Future[None] | None = None

    def begin(self, requests: Sequence[Request], drafts: Mapping[Request, Sequence[int]] | None = None) -> None:
        """Starts to compute the masks after each request's last token, and after those of its draft."""
        self.finish()  # a pass that failed has left it behind
        wanted = [each for each in requests if each.matcher]
        if not wanted:
            return
        if self._pool is None or self._process != os.getpid():
            self._pool, self._process = ThreadPoolExecutor(1, "qwenkern-masks"), os.getpid()
        self._work = self._pool.submit(_prepare, [(each, (drafts or {}).get(each, ())) for each in wanted])

    def finish(self) -> None:
        """Waits for the masks."""
        if self._work:
            work, self._work = self._work, None
            work.result()


def _prepare(wanted: Sequence[tuple[Request, Sequence[int]]]) -> None:
    for request, draft in wanted:
        if request.matcher:
            request.matcher.prepare(draft)
