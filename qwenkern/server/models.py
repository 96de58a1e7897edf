"""The models of a server, by name. They are loaded when somebody asks for them, within a budget of memory.

use(name) ─► loaded? ── yes ────────────────────────────► the model, held until the end of the with statement
                └─ no ─► room in the budget? ─► load ─────►
                              └─ no ─► unload those that nobody uses, the least recently used first; or wait

A model whose engine has stopped is loaded again at once.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
import traceback
import weakref
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import TypeVar

import torch

from ..allocation import give_back
from ..engine.loop import PATIENCE
from ..errors import EngineError, Error, RequestError, shown
from ..Model import Model
from .entry import FAILED, RETRY, Entry, failed, loading, unloaded
from .errors import ApiError
from .source import Size, Source

log = logging.getLogger("qwenkern.server")
T = TypeVar("T")


class Models:
    """Models by name.

    sources: for each name where it comes from, or a function that gives the model. memory: bytes that they may take
    together, as `qwenkern.footprint` counts; None: they are all loaded together. patience: seconds that a request waits
    for a model to load. most_waiting: requests that wait so for a model."""

    def __init__(
        self,
        sources: Mapping[str, Source | Callable[[], Model]],
        memory: int | None = None,
        patience: float = 120.0,
        most_waiting: int = 256,
    ) -> None:
        if not sources:
            raise RequestError("the server has no models; expected at least one")
        self.entries = {
            name: Entry(name, each if isinstance(each, Source) else Source.of(each)) for name, each in sources.items()
        }
        self.memory = memory
        self.created = int(time.time())
        self._patience = patience
        self._most_waiting = most_waiting
        self.is_ready = False  # a model has been loaded since the start
        # Called if a model whose engine has stopped cannot be loaded again.
        self.on_loss: Callable[[BaseException], None] = lambda _: None
        self._is_starting = False
        self._is_closed = False
        self._one = asyncio.Lock()  # one model is loaded at a time
        self._changed = asyncio.Event()  # a request has left its model, or a model is gone
        self._threads: list[threading.Thread] = []  # that load or unload

    @property
    def names(self) -> list[str]:
        return list(self.entries)

    async def start(self) -> None:
        """Loads the first model, which others need not wait for. Raises ApiError."""
        first = next(iter(self.entries.values()))
        self._is_starting = True
        try:
            await asyncio.shield(self._load_once(first))
        finally:
            self._is_starting = False

    @asynccontextmanager
    async def use(self, name: str | None = None, may_load: bool = True) -> AsyncIterator[Model]:
        """Holds a model while a request uses it: it stays loaded. None: the first one. may_load: whether it is loaded
        if it is not.

        Raises ApiError: 404 for an unknown name, 409 if it may not be loaded, 429 if too many wait for it, and 503
        while the model that the server starts with is loading, if loading fails or takes too long, or if other models
        are in use where it should be."""
        entry = self.entry(name)
        if not entry.model and not may_load:
            raise loading(entry) if entry.loading else unloaded(entry)
        if not entry.model and entry.users >= self._most_waiting:
            raise ApiError(
                429,
                f"{entry.users} requests wait for the model {entry.name}; expected at most {self._most_waiting}",
                code="queue_full",
                headers={"Retry-After": "5"},
            )
        entry.users += 1  # first, so that nobody unloads it before it is used
        try:
            self.mend(entry)
            yield entry.model or await self._awaited(entry)
        finally:
            entry.users -= 1
            entry.last_used = time.monotonic()
            self._changed.set()
            self.mend(entry)

    def mend(self, entry: Entry) -> None:
        """Loads a model again if its engine has stopped. Nobody is given the old one any more."""
        if not (fault := entry.fault) or self._is_closed:
            return
        trace = "".join(traceback.format_exception(fault))  # as text: an error's frames keep the model
        log.error("the engine of %s has stopped:\n%s", entry.name, trace)
        size, old = entry.size, [entry.take_out()]
        entry.size, entry.has_stopped = size, True  # which it takes until it is dropped
        self._load_once(entry, old).add_done_callback(self._mended)

    def _mended(self, loading: asyncio.Future[Model]) -> None:
        error = None if loading.cancelled() else loading.exception()
        if isinstance(error, ApiError) and error.code == FAILED and not self._is_closed:  # which ends a loading
            self.on_loss(error)

    def close(self) -> None:
        """Ends all calls, the models' threads, and a loading."""
        self._is_closed = True
        for entry in self.entries.values():
            if entry.model:
                entry.model.close()
        until = time.monotonic() + PATIENCE
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def entry(self, name: str | None) -> Entry:
        """The model of this name; None: the first one. Raises ApiError 404."""
        if name is None:
            return next(iter(self.entries.values()))
        if name not in self.entries:
            raise ApiError(
                404,
                f"the model {shown(name)} does not exist here; expected one of: {', '.join(self.names)}",
                kind="invalid_request_error",
                param="model",
                code="model_not_found",
            )
        return self.entries[name]

    async def _awaited(self, entry: Entry) -> Model:
        """A model that is not loaded yet."""
        if entry.loading and self._is_starting:
            raise loading(entry)
        if entry.failed_at and time.monotonic() < entry.failed_at + RETRY:
            raise failed(entry)
        try:
            return await asyncio.wait_for(asyncio.shield(self._load_once(entry)), self._patience)
        except asyncio.TimeoutError:
            raise loading(entry) from None

    def _load_once(self, entry: Entry, old: list[Model] | None = None) -> asyncio.Future[Model]:
        """The loading of a model: the one in progress, or a new one. old: the only reference here to a model that is
        dropped first."""
        if not entry.loading:
            entry.progress, entry.failed_at = 0.0, None
            entry.loading = asyncio.ensure_future(self._load(entry, old))
            entry.loading.add_done_callback(lambda done: done.cancelled() or done.exception())  # all may have left
        return entry.loading

    async def _load(self, entry: Entry, old: list[Model] | None = None) -> Model:
        begun = time.monotonic()
        try:
            if old:  # at once: the model that is being loaded may wait for this memory
                await self._drop_stopped(old)
                entry.size = Size(0, None)
                self._changed.set()
            async with self._one:
                entry.size = await self._make_room(entry)
                log.info("loading %s: %.2f GB", entry.name, entry.size.bytes / 1e9)
                model = await self._in_thread(lambda: entry.source.load(entry.size.tokens, self._progress_of(entry)))
                entry.model, entry.last_used, self.is_ready = model, time.monotonic(), True
                entry.has_stopped = False
                log.info("loaded %s in %.1f s", entry.name, time.monotonic() - begun)
                return model
        except ApiError:  # there was no room for it
            entry.size, entry.has_stopped = Size(0, None), False
            raise
        except Exception as error:  # whatever it is, it must not stop the other models
            entry.size = Size(0, None)
            log.error("%s cannot be loaded: %s", entry.name, error, exc_info=not isinstance(error, Error))
            entry.failed_at = time.monotonic()
            raise failed(entry) from None
        finally:
            entry.loading = None

    async def _drop_stopped(self, old: list[Model]) -> None:
        """Drops a model whose engine has stopped, and waits until the requests that failed with it are gone."""
        gone, on_gpu = weakref.ref(old[0]), old[0].device.type == "cuda"
        await self._in_thread(lambda: _drop(old))
        until = time.monotonic() + self._patience
        while gone() is not None and time.monotonic() < until:
            await asyncio.sleep(0.5)
            await self._in_thread(lambda: _give_back(on_gpu))

    async def _make_room(self, entry: Entry) -> Size:
        """Unloads models until there is room for another one, whose size it returns."""
        size = await self._in_thread(lambda: entry.source.size(self.memory, self._progress_of(entry)))
        until = time.monotonic() + self._patience
        while (missing := self._missing(size)) > 0:
            idle = [each for each in self.entries.values() if each.model and not each.users and each.size.bytes]
            if missing <= sum(each.size.bytes for each in idle):
                await self._unload(min(idle, key=lambda each: each.last_used))
                continue
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), until - time.monotonic())
            except asyncio.TimeoutError:
                raise ApiError(
                    503,
                    f"there is no memory for the model {entry.name} while other models are in use",
                    code="no_room",
                    headers={"Retry-After": "10"},
                ) from None
        return size

    def _missing(self, size: Size) -> int:
        taken = sum(each.size.bytes for each in self.entries.values())
        return 0 if self.memory is None else taken + size.bytes - self.memory

    async def _unload(self, entry: Entry) -> None:
        log.info("unloading %s: %.2f GB", entry.name, entry.size.bytes / 1e9)
        models = [entry.take_out()]
        await self._in_thread(lambda: _drop(models))

    def _progress_of(self, entry: Entry) -> Callable[[str, int, int], None]:
        def progress(_task: str, done: int, total: int) -> None:
            if self._is_closed:
                raise EngineError("the server stops")
            entry.progress = min(1.0, done / total) if total else 0.0

        return progress

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """Does some work in a thread of its own, for which the end of the program need not wait."""
        result: Future[T] = Future()
        result.set_running_or_notify_cancel()  # it cannot be cancelled

        def run() -> None:
            try:
                result.set_result(work())
            except BaseException as error:
                result.set_exception(error)

        thread = threading.Thread(target=run, name="qwenkern-models", daemon=True)
        self._threads = [*filter(threading.Thread.is_alive, self._threads), thread]
        thread.start()
        return await asyncio.wrap_future(result)


def _drop(models: list[Model]) -> None:
    """Closes models, and gives their memory back. The list holds the only references to them."""
    on_gpu = any(model.device.type == "cuda" for model in models)
    while models:
        models.pop().close()
    _give_back(on_gpu)


def _give_back(on_gpu: bool) -> None:
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    give_back()
