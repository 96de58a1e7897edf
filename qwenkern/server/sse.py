"""Server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from . import errors
from .errors import ApiError

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx passes each event on at once
]
# An ASGI extension of protocol.py: a coroutine that writes a part of a body at once, without the layers below `send`.
WRITE = "qwenkern.write"


# nginx ends a connection that is silent for 60 s (proxy_read_timeout), OpenAI's and Anthropic's clients after 600 s.
QUIET_SECONDS = 15.0
_COMMENT = b": keep-alive\n\n"


class EventStream(Response):
    """A response whose events come from an asynchronous generator, each as bytes that end in a blank line. It sends
    ``quiet`` after QUIET_SECONDS without an event, or at the latest after twice as long."""

    def __init__(
        self,
        first: asyncio.Future[bytes],
        rest: AsyncGenerator[bytes, None],
        as_event: Callable[[ApiError], bytes],
        quiet: bytes,
    ) -> None:
        self._first = first
        self._rest = rest
        self._as_event = as_event
        self._quiet = quiet
        self._is_quiet = not first.done()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def write(event: bytes) -> None:
            await send({"type": "http.response.body", "body": event, "more_body": True})

        write = scope.get("extensions", {}).get(WRITE, write)
        async with aclosing(self._rest) as rest, _ended(self._first):
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            keeping = asyncio.ensure_future(self._keep_alive(write))
            try:
                await write(await self._first)
                async for event in rest:
                    self._is_quiet = False
                    await write(event)
            except asyncio.CancelledError:  # the server stops, or the client has disconnected and gets nothing
                event = self._as_event(errors.shutting_down())
                await send({"type": "http.response.body", "body": event, "more_body": False})
                raise
            except Exception as error:
                told = errors.of(error)
                errors.note(error, told, scope["state"]["request_id"])
                await write(self._as_event(told))
            finally:
                keeping.cancel()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _keep_alive(self, write: Callable[[bytes], Awaitable[None]]) -> None:
        while True:
            if self._is_quiet:
                await write(self._quiet)
            self._is_quiet = True
            await asyncio.sleep(QUIET_SECONDS)


@asynccontextmanager
async def _ended(first: asyncio.Future[bytes]) -> AsyncIterator[None]:
    """At the end of the with statement, cancels the wait for the first event if it still goes on: its generator cannot
    be closed before."""
    try:
        yield
    finally:
        if not first.done():
            first.cancel()
            await asyncio.wait({first})


async def stream(
    events: AsyncGenerator[bytes, None], as_event: Callable[[ApiError], bytes], quiet: bytes = _COMMENT
) -> EventStream:
    """The response that sends these events. Waits for the first event, for QUIET_SECONDS at most. Raises an error that
    comes meanwhile, so that the response gets its status. A later error becomes an event, by ``as_event``. quiet: bytes
    that keep a silent connection open."""
    first = asyncio.ensure_future(anext(events))
    try:
        await asyncio.wait({first}, timeout=QUIET_SECONDS)
    except asyncio.CancelledError:
        first.cancel()
        await asyncio.wait({first})
        raise
    if first.done():
        first.result()
    return EventStream(first, events, as_event, quiet)


DONE = b"data: [DONE]\n\n"


def openai_error(error: ApiError) -> bytes:
    """The events of an error in a stream of OpenAI's APIs: the error, and the end of the stream."""
    return f"data: {json.dumps(errors.openai_body(error))}\n\n".encode() + DONE
