"""What the handlers of a server share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from .admission import Admission
from .models import Models
from .settings import Settings

T = TypeVar("T")
THREADS = 4  # for templates, tokenizers and grammars


class Service:
    """The models of a server, its settings, the turns that wait, and threads for what takes the CPU long."""

    def __init__(self, models: Models, settings: Settings) -> None:
        self.models = models
        self.settings = settings
        self.admission = Admission(settings.bounds)
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="qwenkern-server")

    async def in_pool(self, work: Callable[..., T], *arguments: Any) -> T:
        """Has a thread of the pool do some work."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *arguments)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.models.close()
