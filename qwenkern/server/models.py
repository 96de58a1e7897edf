"""The models of a server, by name. A model is loaded when a request needs it, within a memory budget.

use(name) ─► loaded? ── yes ───────────────────────────────► the model, which stays until the with statement ends
                └─ no ─► fits the budget? ── yes ─► load ───►
                               └─ no ─► unload models without requests, the least recently used first; or wait

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

    sources: the name of each model -> its Source, or a function that returns the model. memory: bytes that the loaded
    models may take together, as `qwenkern.footprint` counts; None: no limit. patience: seconds that a request waits for
    a model to load. most_waiting: the most requests that may wait for one model to load."""

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
        self.is_ready = False  # whether a model has been loaded since the start
        # Called if a model whose engine has stopped cannot be loaded again.
        self.on_loss: Callable[[BaseException], None] = lambda _: None
        self._is_starting = False
        self._is_closed = False
        self._one = asyncio.Lock()  # so that one model is loaded at a time
        self._changed = asyncio.Event()  # a request has ended its use of a model, or a model has freed its memory
        self._threads: list[threading.Thread] = []  # threads that load or unload models

    @property
    def names(self) -> list[str]:
        return list(self.entries)

    async def start(self) -> None:
        """Loads the first model. Until it is loaded, requests for it get 503 at once. Raises ApiError."""
        first = next(iter(self.entries.values()))
        self._is_starting = True
        try:
            await asyncio.shield(self._load_once(first))
        finally:
            self._is_starting = False

    @asynccontextmanager
    async def use(self, name: str | None = None, may_load: bool = True) -> AsyncIterator[Model]:
        """Yields a model, which stays loaded until the end of the with statement. name: None means the first model.
        may_load: whether to load the model if it is not loaded.

        Raises ApiError: 404 for an unknown name, 409 if the model is not loaded and may_load is False, 429 if too many
        requests wait for it, and 503 if it is the first model and the server is still starting, if loading fails or
        takes too long, or if models in use leave no memory for it."""
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
        entry.users += 1  # before anything else, so that the model is not unloaded meanwhile
        try:
            self.mend(entry)
            yield entry.model or await self._awaited(entry)
        finally:
            entry.users -= 1
            entry.last_used = time.monotonic()
            self._changed.set()
            self.mend(entry)

    def mend(self, entry: Entry) -> None:
        """Loads a model again if its engine has stopped. New requests do not get the old one any more."""
        if not (fault := entry.fault) or self._is_closed:
            return
        trace = "".join(traceback.format_exception(fault))  # as text: the frames of an error keep the model in memory
        log.error("the engine of %s has stopped:\n%s", entry.name, trace)
        size, old = entry.size, [entry.take_out()]
        entry.size, entry.has_stopped = size, True  # the old model takes this memory until it is dropped
        self._load_once(entry, old).add_done_callback(self._mended)

    def _mended(self, loading: asyncio.Future[Model]) -> None:
        error = None if loading.cancelled() else loading.exception()
        if isinstance(error, ApiError) and error.code == FAILED and not self._is_closed:  # closing aborts a loading
            self.on_loss(error)

    def close(self) -> None:
        """Ends all calls, the threads of the models, and a loading in progress."""
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
        """The loading of a model: the one in progress, or a new one. old: a list with a stopped model to drop first.
        The server must have no other reference to this model."""
        if not entry.loading:
            entry.progress, entry.failed_at = 0.0, None
            entry.loading = asyncio.ensure_future(self._load(entry, old))
            # Fetches the exception: asyncio complains about one that nobody has fetched, and no request may wait here.
            entry.loading.add_done_callback(lambda done: done.cancelled() or done.exception())
        return entry.loading

    async def _load(self, entry: Entry, old: list[Model] | None = None) -> Model:
        begun = time.monotonic()
        try:
            if old:  # before self._one: the model that is being loaded may wait for this memory
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
        except ApiError:  # from _make_room: there was no memory for it
            entry.size, entry.has_stopped = Size(0, None), False
            raise
        except Exception as error:  # any error: it must not stop the other models
            entry.size = Size(0, None)
            log.error("%s cannot be loaded: %s", entry.name, error, exc_info=not isinstance(error, Error))
            entry.failed_at = time.monotonic()
            raise failed(entry) from None
        finally:
            entry.loading = None

    async def _drop_stopped(self, old: list[Model]) -> None:
        """Drops a model whose engine has stopped. Waits until the requests that failed with it no longer refer to
        it, or for ``patience`` seconds."""
        gone, on_gpu = weakref.ref(old[0]), old[0].device.type == "cuda"
        await self._in_thread(lambda: _drop(old))
        until = time.monotonic() + self._patience
        while gone() is not None and time.monotonic() < until:
            await asyncio.sleep(0.5)
            await self._in_thread(lambda: _give_back(on_gpu))

    async def _make_room(self, entry: Entry) -> Size:
        """Unloads models until the budget has room for this one. Returns its size. Raises ApiError 503 after
        ``patience`` seconds."""
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
        """Does some work in a thread of its own. It is a daemon thread, so that the program can end before it does."""
        result: Future[T] = Future()
        result.set_running_or_notify_cancel()  # from now on, it cannot be cancelled

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
    """Closes models, and returns their memory to the system. The list must have the only references to them."""
    on_gpu = any(model.device.type == "cuda" for model in models)
    while models:
        models.pop().close()
    _give_back(on_gpu)


def _give_back(on_gpu: bool) -> None:
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    give_back()
