"""Engines that a test steps itself, and checks of what a model's own engine leaves behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from qwenkern.engine import Engine, Limits, Output, Request, Runner
from qwenkern.engine.capture import Capture

PATIENCE = 60  # seconds after which something counts as hanging
TO_START = 300  # the same for a program that imports torch


def eventually(condition: Callable[[], Any], message: str = "", seconds: float = PATIENCE) -> None:
    """Waits until the condition is true, which depends on another thread, such as the one that steps the engine."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, message or "it does not come true"
        time.sleep(0.001)


def all_free(model) -> bool:
    """Whether no call is left, and no sequence has a page."""
    is_idle = model._engines is None or (model._loop.is_idle and not model._loop._sinks)
    return is_idle and model.cache.num_free_pages == model.cache.num_pages


def check_pages(model) -> None:
    """All pages are free after the forward pass in progress."""
    eventually(lambda: all_free(model), "pages or requests are left")


def run(engine: Engine, requests: Iterable[Request]) -> Iterator[Output]:
    """Steps an engine until the requests have ended. Raises the first error."""
    with engine:
        for request in requests:
            engine.add(request)
        while engine.has_requests:
            for output in engine.step():
                if output.error:
                    raise output.error
                yield output


def run_all(model, requests: Iterable[Request], **limits: Any) -> None:
    """Runs requests on an engine of their own. The model's own engine must be idle."""
    for _ in run(Engine(model._runner, Limits(**{"prefill_chunk": 512} | limits)), requests):
        pass


def with_capture(model, capture: Capture | None):
    """The model, with another way to capture its steps from the next call on."""
    model._runner = Runner(model.module, model.cache, capture)
    model._engines = None
    return model


def read(stream, count: int) -> None:
    """Reads ``count`` tokens of a stream, also those without text."""
    for _ in range(count):
        stream._take(next(stream._call))


class Gate:
    """Makes the thread of a model's engine wait before each step until the test lets it go on."""

    def __init__(self, model) -> None:
        self._engine, self._allowed, self._done = model._loop.engine, threading.Semaphore(0), 0
        self._is_open = False
        self.has_come = threading.Event()  # set when the thread waits before a step

    def __enter__(self) -> Gate:
        step = self._engine.step

        def gated() -> list[Output]:
            self.has_come.set()
            if not self._is_open:
                self._allowed.acquire()
            try:
                return step()
            finally:
                self._done += 1

        self._engine.step = gated
        return self

    def __exit__(self, *_: object) -> None:
        self.open()
        del self._engine.step

    def open(self) -> None:
        """Lets the thread go on without waiting."""
        self._is_open = True
        self._allowed.release()

    def steps(self, count: int) -> None:
        """Lets the thread make ``count`` steps, and waits for them."""
        until = self._done + count
        self._allowed.release(count)
        eventually(lambda: self._done >= until, "the engine has no step to make")
