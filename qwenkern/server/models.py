"""The models of a server, by name."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

from ..errors import shown
from ..Model import Model
from .errors import ApiError


class Models:
    """Models by name. ``sources``: for each name, what loads it."""

    def __init__(self, sources: Mapping[str, Callable[[], Model]]) -> None:
        self._sources = dict(sources)
        self._loaded: dict[str, Model] = {}
        self._error: Exception | None = None
        self.created = int(time.time())

    @property
    def names(self) -> list[str]:
        return list(self._sources)

    @property
    def is_ready(self) -> bool:
        """Whether requests are answered at once; otherwise the first model is still loading."""
        return bool(self._loaded)

    async def start(self) -> None:
        """Loads the first model, in a thread."""
        name = self.names[0]
        self._loaded[name] = await asyncio.to_thread(self._sources[name])

    @asynccontextmanager
    async def use(self, name: str | None) -> AsyncIterator[Model]:
        """Holds a model while a request uses it. None: the first one. Raises ApiError 404 or 503."""
        name = self.names[0] if name is None else name
        if name not in self._sources:
            known = ", ".join(self.names)
            raise ApiError(
                404,
                f"the model {shown(name)} does not exist here; expected one of: {known}",
                kind="invalid_request_error",
                param="model",
                code="model_not_found",
            )
        if name not in self._loaded:
            raise ApiError(503, f"the model {name} is loading", code="loading", headers={"Retry-After": "5"})
        yield self._loaded[name]

    def close(self) -> None:
        """Ends all calls, and the models' threads."""
        for model in self._loaded.values():
            model.close()
