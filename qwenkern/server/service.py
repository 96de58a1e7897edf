"""What the handlers of a server share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from .admission import Admission
from .models import Models
from .settings import Settings
from .turns import Finished

T = TypeVar("T")
THREADS = 4  # for templates, tokenizers and grammars


class Observer:
    """Is told what happens, for metrics. This one does nothing."""

    def refused(self, status: int) -> None:
        """A turn was not admitted, or has waited too long."""

    def first_token(self, seconds: float) -> None:
        """An answer has its first token, so long after the request came."""

    def gap(self, seconds: float) -> None:
        """The time between two outputs of an answer that is streamed."""

    def finished(self, finished: Finished) -> None:
        """An answer has ended."""


class Service:
    """The models of a server, its settings, the turns that wait, and threads for what takes the CPU long."""

    def __init__(self, models: Models, settings: Settings, observer: Observer | None = None) -> None:
        self.models = models
        self.settings = settings
        self.observer = observer or Observer()
        self.admission = Admission(settings.bounds)
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="qwenkern-server")

    async def in_pool(self, work: Callable[..., T], *arguments: Any) -> T:
        """Has a thread of the pool do some work."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *arguments)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.models.close()
