"""The objects that the handlers of a server share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from .admission import Admission, Bodies
from .errors import ApiError
from .models import Models
from .settings import Settings

T = TypeVar("T")


class Threads:
    """Threads for one kind of work, so that it need not wait for other kinds."""

    def __init__(self, name: str, count: int, most: int | None = None) -> None:
        self._pool = ThreadPoolExecutor(count, thread_name_prefix=f"qwenkern-{name}")
        self._most = most  # callers at a time; None: their number is limited elsewhere
        self._callers = 0

    async def do(self, work: Callable[..., T], *arguments: Any) -> T:
        """Does some work in a thread. A caller that is cancelled no longer counts. Raises ApiError 429 if there are too
        many callers."""
        if self._most is not None and self._callers >= self._most:
            message = f"{self._callers} requests of this kind wait already; expected at most {self._most}"
            raise ApiError(429, f"{message}: try again later", code="queue_full", headers={"Retry-After": "5"})
        call = [work, *arguments]  # a list to clear: the pool keeps queued work, even if its caller is cancelled

        def run() -> T:
            do, *given = call
            return do(*given)

        self._callers += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, run)
        finally:
            self._callers -= 1
            call.clear()

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


class Service:
    """The models of a server, its settings, its queue, and threads for work that takes much processor time."""

    def __init__(self, models: Models, settings: Settings) -> None:
        bounds = settings.bounds
        self.models = models
        self.settings = settings
        self.admission = Admission(bounds)
        self.bodies = Bodies(bounds)
        self.large = Threads("bodies", 1)  # large bodies; one at a time: parsing takes many times the bytes of a body
        self._answers = Threads("answers", 4)  # templates and tokenizers for requests with a place in the queue
        self._tokens = Threads("tokens", 2, bounds.waiting)  # requests that need no answer of a model
        self.grammars = Threads("grammars", 2, bounds.grammars)  # compile grammars in processes, for seconds each

    async def in_pool(self, work: Callable[..., T], *arguments: Any) -> T:
        """Does some work for an answer in a thread."""
        return await self._answers.do(work, *arguments)

    async def aside(self, work: Callable[..., T], *arguments: Any) -> T:
        """Does some work in a thread that no answer waits for. Raises ApiError: 429 if too many requests wait for such
        work, and 503 if this one has waited too long."""
        try:
            return await asyncio.wait_for(self._tokens.do(work, *arguments), self.settings.bounds.waiting_seconds)
        except (asyncio.TimeoutError, TimeoutError):
            raise self.admission.too_long() from None

    def close(self) -> None:
        for threads in (self.large, self._answers, self._tokens, self.grammars):
            threads.close()
        self.models.close()
