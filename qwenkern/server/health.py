"""GET /health: whether the engines make progress. It needs no key, because load balancers and supervisors call it.

The thread of an idle engine must run an empty function within ANSWERS seconds. A busy engine must have ended a step in
the last HANGS seconds, which is longer than any step should take.
"""

from __future__ import annotations

import asyncio
import time
from typing import Literal

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..errors import EngineError
from .endpoints import Endpoint
from .entry import Entry
from .models import Models
from .service import Service

ANSWERS = 2.0
HANGS = 120.0


class Health(BaseModel):
    """The state of a server. The HTTP status is 200 for ok, and 503 for the others."""

    status: Literal["ok", "loading", "failed"]
    reason: str | None  # why it is not ok


async def health(service: Service, request: Request, body: None) -> Response:
    """Tells whether the engines make progress. Answers within about two seconds."""
    found = await health_of(service.models)
    retry = {} if found.status == "ok" else {"Retry-After": "5"}
    return JSONResponse(found.model_dump(), 200 if found.status == "ok" else 503, retry)


async def health_of(models: Models) -> Health:
    """The state of a server with these models."""
    if not models.is_ready:
        first = models.entry(None)
        if first.state == "failed":
            return Health(status="failed", reason="the model cannot be loaded; the server's log has the reason")
        return Health(status="loading", reason=f"the model is loading ({first.progress:.0%})")
    if any(entry.has_stopped for entry in models.entries.values()):
        return Health(status="failed", reason="an engine has stopped, and its model is being loaded again")
    reasons = await asyncio.gather(*(_fault(models, entry) for entry in models.entries.values() if entry.model))
    reason = next(filter(None, reasons), None)
    return Health(status="failed" if reason else "ok", reason=reason)


async def _fault(models: Models, entry: Entry) -> str | None:
    """Why the engine of a loaded model makes no progress, or None."""
    assert entry.model
    loop = entry.model._loop  # this starts the engine if no request has come yet
    engine = loop.engine
    if engine.fault:
        models.mend(entry)
        return "an engine has stopped; the server's log has the reason"
    if engine.counts.busy_since is None:
        try:
            if entry.ping is None or entry.ping.done():
                entry.ping = loop.submit(_nothing)
        except EngineError:
            return "a model is closed"
        done, _ = await asyncio.wait([asyncio.wrap_future(entry.ping)], timeout=ANSWERS)
        if not done and engine.counts.busy_since is None:
            return f"the thread of an engine does not answer within {ANSWERS:g} s"
    since = engine.counts.busy_since
    if since is not None and time.monotonic() - since > HANGS:
        return f"a pass of an engine takes longer than {HANGS:g} s"
    return None


def _nothing() -> None:
    """An empty function: the thread of an engine that runs it makes progress."""


ENDPOINTS = [
    Endpoint("/health", "GET", health, None, "Says whether the engines make progress", answer=Health, is_open=True)
]
