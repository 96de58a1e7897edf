"""Server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from . import errors
from .errors import ApiError

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx passes each event on at once
]


class EventStream(Response):
    """A response whose events come from an asynchronous generator, each as bytes that end in a blank line."""

    def __init__(self, first: bytes, rest: AsyncGenerator[bytes, None], as_event: Callable[[ApiError], bytes]) -> None:
        self._first = first
        self._rest = rest
        self._as_event = as_event

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._rest) as rest:
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            await send({"type": "http.response.body", "body": self._first, "more_body": True})
            try:
                async for event in rest:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            except asyncio.CancelledError:  # the server ends, or the client is gone, which then sees nothing
                event = self._as_event(errors.shutting_down())
                await send({"type": "http.response.body", "body": event, "more_body": False})
                raise
            except Exception as error:
                told = errors.of(error)
                errors.note(error, told, scope["state"]["request_id"])
                event = self._as_event(told)
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def stream(events: AsyncGenerator[bytes, None], as_event: Callable[[ApiError], bytes]) -> EventStream:
    """The response of some events. An error before the first of them is raised, so that it becomes a status; a later
    one becomes an event."""
    return EventStream(await anext(events), events, as_event)


DONE = b"data: [DONE]\n\n"


def openai_error(error: ApiError) -> bytes:
    """An error in a stream of OpenAI's APIs, and its end."""
    return f"data: {json.dumps(errors.openai_body(error))}\n\n".encode() + DONE
