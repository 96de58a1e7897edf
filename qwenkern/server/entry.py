"""A model of a server with its name, whether it is loaded, and the errors that clients get while it is not."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import Literal

from ..engine.counts import Counts
from ..engine.engine import Engine
from ..errors import EngineError
from ..Model import Model
from .errors import ApiError
from .source import Size, Source

FAILED = "model_failed"  # error code for a model that cannot be loaded
RETRY = 10.0  # seconds after which a request may try again to load a model whose loading has failed


class Entry:
    """A model of a server, loaded or not."""

    def __init__(self, name: str, source: Source) -> None:
        self.name = name
        self.source = source
        self.model: Model | None = None
        self.size = Size(0, None)  # its memory, while it is loaded or loading
        self.users = 0  # requests that use it or wait for it
        self.last_used = 0.0  # time.monotonic()
        self.loading: asyncio.Future[Model] | None = None
        self.progress = 0.0  # of the loading, 0 to 1
        self.failed_at: float | None = None  # time.monotonic(), if the last loading has failed
        self.has_stopped = False  # its engine has stopped, and the model is not loaded again yet
        self.ping: Future[None] | None = None  # the empty work that health.py has given the engine's thread
        self._past = Counts()  # of its earlier engines

    @property
    def state(self) -> Literal["loaded", "loading", "failed", "unloaded"]:
        """One of loaded, loading, failed and unloaded."""
        if self.model:
            return "loaded"
        return "loading" if self.loading else "failed" if self.failed_at else "unloaded"

    @property
    def engine(self) -> Engine | None:
        """The engine of the loaded model. None before the first request."""
        loop = self.model._engines if self.model else None
        return loop.engine if loop else None

    @property
    def counts(self) -> Counts:
        """The counts of all engines of this model since the server's start."""
        total = Counts()
        total.add(self._past)
        if engine := self.engine:
            total.add(engine.counts)
        return total

    @property
    def fault(self) -> EngineError | None:
        """Why the engine of the loaded model has stopped."""
        return self.engine.fault if self.engine else None

    def take_out(self) -> Model:
        """Removes the loaded model from this entry, and returns it."""
        assert self.model
        self._past, model = self.counts, self.model
        self.model, self.size, self.ping = None, Size(0, None), None
        return model


def loading(entry: Entry) -> ApiError:
    """The error while a model is loading."""
    return ApiError(
        503,
        f"the model {entry.name} is loading ({entry.progress:.0%})",
        code="loading",
        headers={"Retry-After": "5"},
    )


def unloaded(entry: Entry) -> ApiError:
    """The error of a request that may not load a model, such as a GET."""
    return ApiError(
        409,
        f"the model {entry.name} is not loaded, and this request loads none; expected one that is, or POST /tokenize "
        "first, which loads it",
        param="model",
        code="not_loaded",
    )


def failed(entry: Entry) -> ApiError:
    """The error after a model could not be loaded, until the next try."""
    return ApiError(
        503,
        f"the model {entry.name} cannot be loaded; the server's log has the reason",  # the reason may contain a path
        code=FAILED,
        headers={"Retry-After": str(round(RETRY))},
    )
