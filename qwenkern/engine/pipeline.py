"""Decode steps that are launched before the host has read the tokens of the earlier ones."""

from __future__ import annotations

from collections import deque

import torch

from ..sampling import Drawing, Sampled, sampled
from .captured_step import CapturedStep, Read
from .request import Request
from .runner import Runner
from .scheduler import Scheduler


class DecodePipeline:
    """Captured steps of requests that each have one pending token. The pipeline launches steps until the scheduler must
    decide again, because a request has ended, another has arrived, or the cache is full. Tokens that a request decodes
    after its end are discarded."""

    def __init__(self, runner: Runner, scheduler: Scheduler, requests: list[Request], drawing: Drawing) -> None:
        self._cache, self._captured, self._scheduler = runner.cache, runner.captured, scheduler
        self.requests, self._drawing = requests, drawing
        self._has_begun = False  # the scheduler has chosen the first step
        self._key = object()  # marks the captured step as loaded for this pipeline
        self._unread: deque[Read] = deque()  # the tokens of the steps in flight
        self._launches_left = min(request.max_tokens - len(request.output_ids) for request in requests)

    def tokens(self) -> list[tuple[Request, Sampled]]:
        """Launches more steps, then returns the next token of each request, even of one that has ended meanwhile.
        Returns an empty list when all tokens are read and the scheduler must decide."""
        while len(self._unread) <= self._captured.in_flight and self._launch_next():
            pass
        if not self._unread:
            return []
        rows = self._unread.popleft()()[: len(self.requests)]
        return [(request, sampled(row, request)) for request, row in zip(self.requests, rows, strict=True)]

    def _launch_next(self) -> bool:
        if not self._launches_left:
            return False
        step = self._captured.get(len(self.requests), self._drawing)
        assert step is not None, "the engine makes a pipeline only where steps can be captured"
        is_loaded = step.owner is self._key  # False at first, and after another pipeline used the step
        if (self._has_begun and not self._scheduler.goes_on(self.requests)) or (self._unread and not is_loaded):
            return False
        self._has_begun = True
        step.owner = None  # set again below, once the launch has succeeded
        self._launch(step, is_loaded)
        step.owner = self._key
        self._unread.append(step.tokens())
        self._launches_left -= 1
        return True

    @torch.inference_mode()
    def _launch(self, step: CapturedStep, is_loaded: bool) -> None:
        """Launches a step. It continues from its last replay, or is first loaded with the host's tokens and slots."""
        if is_loaded:
            self._add_pages(step)
        else:
            step.load(self._cache.batch([(request.table, request.pending_ids(1)) for request in self.requests]))
            step.load_sampling(self.requests)
        step.launch(self.requests)
        for request in self.requests:
            request.table.length += 1

    def _add_pages(self, step: CapturedStep) -> None:
        for row, request in enumerate(self.requests):
            table = request.table
            if self._cache.missing_pages(table, 1):
                self._cache.extend(table, 1)
                step.add_page(row, len(table.pages) - 1, table.pages[-1])
