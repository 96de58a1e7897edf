"""A model of a server, by its name: whether it is loaded, and what a client is told while it is not."""

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

FAILED = "model_failed"  # the code of the error of a model that cannot be loaded
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
        self.has_stopped = False  # its engine has, and the model is not loaded again yet
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

    @property
    def fault(self) -> EngineError | None:
        """Why the engine of the loaded model has stopped."""
        return self.engine.fault if self.engine else None

    def take_out(self) -> Model:
        """The loaded model, which is then no longer here."""
        assert self.model
        self._past, model = self.counts, self.model
        self.model, self.size, self.ping = None, Size(0, None), None
        return model


def loading(entry: Entry) -> ApiError:
    """The error while it loads."""
    return ApiError(
        503,
        f"the model {entry.name} is loading ({entry.progress:.0%})",
        code="loading",
        headers={"Retry-After": "5"},
    )


def unloaded(entry: Entry) -> ApiError:
    """The error of a request that loads no model."""
    return ApiError(
        409,
        f"the model {entry.name} is not loaded, and this request loads none; expected one that is, or POST /tokenize "
        "first, which loads it",
        param="model",
        code="not_loaded",
    )


def failed(entry: Entry) -> ApiError:
    """The error until it is tried again."""
    return ApiError(
        503,
        f"the model {entry.name} cannot be loaded; the server's log has the reason",  # which may have a path
        code=FAILED,
        headers={"Retry-After": str(round(RETRY))},
    )
