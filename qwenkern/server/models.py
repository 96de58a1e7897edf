"""The models of a server, by name. They are loaded when somebody asks for them, within a budget of memory.

use(name) ─► loaded? ── yes ────────────────────────────► the model, held until the end of the with statement
                └─ no ─► room in the budget? ─► load ─────►
                              └─ no ─► unload those that nobody uses, the least recently used first; or wait
"""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Literal, TypeVar

import torch

from ..allocation import give_back
from ..engine.counts import Counts
from ..engine.engine import Engine
from ..engine.loop import PATIENCE
from ..errors import EngineError, Error, RequestError, shown
from ..Model import Model
from .errors import ApiError
from .source import Size, Source

log = logging.getLogger("qwenkern.server")
T = TypeVar("T")
RETRY = 10.0  # seconds after which a model that could not be loaded is tried again


class Entry:
    """A model of a server, loaded or not."""

    def __init__(self, name: str, source: Source) -> None:
        self.name = name
        self.source = source
        self.model: Model | None = None
        self.size = Size(0, None)  # what it takes while it is loaded or loading
        self.users = 0  # requests that hold it or wait for it
        self.last_used = 0.0  # time.monotonic()
        self.loading: asyncio.Future[Model] | None = None
        self.progress = 0.0  # of the loading, 0 to 1
        self.failed_at: float | None = None  # time.monotonic() of the last loading, if it failed
        self.ping: Future[None] | None = None  # of health.py
        self._past = Counts()  # of its engines that are gone

    @property
    def state(self) -> Literal["loaded", "loading", "failed", "unloaded"]:
        """One of loaded, loading, failed and unloaded."""
        if self.model:
            return "loaded"
        return "loading" if self.loading else "failed" if self.failed_at else "unloaded"

    @property
    def engine(self) -> Engine | None:
        """Its engine, if a request has made it."""
        loop = self.model._engines if self.model else None
        return loop.engine if loop else None

    @property
    def counts(self) -> Counts:
        """What its engines have done since the server's start."""
        total = Counts()
        total.add(self._past)
        if engine := self.engine:
            total.add(engine.counts)
        return total

    def take_out(self) -> Model:
        """The loaded model, which is then no longer here."""
        assert self.model
        self._past, model = self.counts, self.model
        self.model, self.size, self.ping = None, Size(0, None), None
        return model


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
        self._is_starting = False
        self._is_closed = False
        self._one = asyncio.Lock()  # one model is loaded at a time
        self._changed = asyncio.Event()  # a request has left its model
        self._thread: threading.Thread | None = None  # that loads or unloads

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
            raise _loading(entry) if entry.loading else _unloaded(entry)
        if not entry.model and entry.users >= self._most_waiting:
            raise ApiError(
                429,
                f"{entry.users} requests wait for the model {entry.name}; expected at most {self._most_waiting}",
                code="queue_full",
                headers={"Retry-After": "5"},
            )
        entry.users += 1  # first, so that nobody unloads it before it is used
        try:
            yield entry.model or await self._awaited(entry)
        finally:
            entry.users -= 1
            entry.last_used = time.monotonic()
            self._changed.set()

    def close(self) -> None:
        """Ends all calls, the models' threads, and a loading."""
        self._is_closed = True
        for entry in self.entries.values():
            if entry.model:
                entry.model.close()
        if self._thread:
            self._thread.join(PATIENCE)

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
            raise _loading(entry)
        if entry.failed_at and time.monotonic() < entry.failed_at + RETRY:
            raise _failed(entry)
        try:
            return await asyncio.wait_for(asyncio.shield(self._load_once(entry)), self._patience)
        except asyncio.TimeoutError:
            raise _loading(entry) from None

    def _load_once(self, entry: Entry) -> asyncio.Future[Model]:
        """The loading of a model: the one in progress, or a new one."""
        if not entry.loading:
            entry.progress, entry.failed_at = 0.0, None
            entry.loading = asyncio.ensure_future(self._load(entry))
            entry.loading.add_done_callback(lambda done: done.cancelled() or done.exception())  # all may have left
        return entry.loading

    async def _load(self, entry: Entry) -> Model:
        begun = time.monotonic()
        try:
            async with self._one:
                entry.size = await self._make_room(entry)
                log.info("loading %s: %.2f GB", entry.name, entry.size.bytes / 1e9)
                model = await self._in_thread(lambda: entry.source.load(entry.size.tokens, self._progress_of(entry)))
                entry.model, entry.last_used, self.is_ready = model, time.monotonic(), True
                log.info("loaded %s in %.1f s", entry.name, time.monotonic() - begun)
                return model
        except ApiError:  # there was no room for it
            entry.size = Size(0, None)
            raise
        except Exception as error:  # whatever it is, it must not stop the other models
            entry.size = Size(0, None)
            log.error("%s cannot be loaded: %s", entry.name, error, exc_info=not isinstance(error, Error))
            entry.failed_at = time.monotonic()
            raise _failed(entry) from None
        finally:
            entry.loading = None

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

        self._thread = threading.Thread(target=run, name="qwenkern-models", daemon=True)
        self._thread.start()
        return await asyncio.wrap_future(result)


def _loading(entry: Entry) -> ApiError:
    return ApiError(
        503,
        f"the model {entry.name} is loading ({entry.progress:.0%})",
        code="loading",
        headers={"Retry-After": "5"},
    )


def _unloaded(entry: Entry) -> ApiError:
    return ApiError(
        409,
        f"the model {entry.name} is not loaded, and this request loads none; expected one that is, or POST /tokenize "
        "first, which loads it",
        param="model",
        code="not_loaded",
    )


def _failed(entry: Entry) -> ApiError:
    return ApiError(
        503,
        f"the model {entry.name} cannot be loaded; the server's log has the reason",  # which may have a path
        code="model_failed",
        headers={"Retry-After": str(round(RETRY))},
    )


def _drop(models: list[Model]) -> None:
    """Closes models, and gives their memory back. The list holds the only references to them."""
    on_gpu = any(model.device.type == "cuda" for model in models)
    while models:
        models.pop().close()
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    give_back()
