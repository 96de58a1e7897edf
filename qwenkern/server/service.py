"""What the handlers of a server share."""

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
    """Threads for one kind of work, which no other kind keeps waiting."""

    def __init__(self, name: str, count: int, most: int | None = None) -> None:
        self._pool = ThreadPoolExecutor(count, thread_name_prefix=f"qwenkern-{name}")
        self._most = most  # that wait for it or have it done; None: others bound them
        self._callers = 0

    async def do(self, work: Callable[..., T], *arguments: Any) -> T:
        """Has a thread do some work. A caller that no longer waits gives its place up. Raises ApiError 429."""
        if self._most is not None and self._callers >= self._most:
            message = f"{self._callers} requests of this kind wait already; expected at most {self._most}"
            raise ApiError(429, f"{message}: try again later", code="queue_full", headers={"Retry-After": "5"})
        call = [work, *arguments]  # the pool keeps what waits in it, even if the caller is gone

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
    """The models of a server, its settings, the turns that wait, and threads for what takes the CPU long."""

    def __init__(self, models: Models, settings: Settings) -> None:
        bounds = settings.bounds
        self.models = models
        self.settings = settings
        self.admission = Admission(bounds)
        self.bodies = Bodies(bounds)
        self.large = Threads("bodies", 1)  # bodies; one at a time, because parsed ones take many times their bytes
        self._answers = Threads("answers", 4)  # templates and tokenizers for those that admission has let in
        self._tokens = Threads("tokens", 2, bounds.waiting)  # for those that want no answer of a model
        self.grammars = Threads("grammars", 2, bounds.grammars)  # which wait for processes, up to seconds each

    async def in_pool(self, work: Callable[..., T], *arguments: Any) -> T:
        """Has a thread do some work for an answer."""
        return await self._answers.do(work, *arguments)

    async def aside(self, work: Callable[..., T], *arguments: Any) -> T:
        """Has a thread do some work that keeps no answer waiting. Raises ApiError: 429 if too many wait for such work,
        and 503 if this has waited too long."""
        try:
            return await asyncio.wait_for(self._tokens.do(work, *arguments), self.settings.bounds.waiting_seconds)
        except (asyncio.TimeoutError, TimeoutError):
            raise self.admission.too_long() from None

    def close(self) -> None:
        for threads in (self.large, self._answers, self._tokens, self.grammars):
            threads.close()
        self.models.close()
