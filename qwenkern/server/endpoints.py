"""The table of a server: which function answers which path, and what its body is.

request ─► body, within bounds ─► handler ─► response
                                     ▲
           client is gone ── cancels ┘
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from . import bodies, errors
from .errors import ApiError
from .service import Service

log = logging.getLogger("qwenkern.server")

LARGE = 2**16  # bytes of a body that takes more than a millisecond to read
Handler = Callable[[Service, Request, Any], Awaitable[Response]]


@dataclass(frozen=True)
class Endpoint:
    """A path with a method. The handler gets the service, the request, and its body (None if it takes none)."""

    path: str
    method: str
    handler: Handler
    body: type[bodies.Body] | None
    summary: str
    as_error: Callable[[ApiError], dict[str, Any]] = errors.openai_body  # the form of its errors
    answer: type[BaseModel] | None = None  # the body of status 200; None: any JSON object
    streams: bool = False  # whether `"stream": true` gives server-sent events
    is_open: bool = False  # whether it takes no API key


class Served:
    """An endpoint as an ASGI application."""

    def __init__(self, endpoint: Endpoint, service: Service) -> None:
        self.endpoint = endpoint
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request, has_begun = Request(scope, receive), False
        request_id = f"req_{uuid.uuid4().hex}"

        async def sending(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            try:
                body = await self._body(request)
            except ApiError as error:
                await _failure(error, self.endpoint)(scope, receive, sending)
                return
            await _while_connected(self._answer(request, body, sending), receive)
        except ClientDisconnect:
            pass
        except Exception as error:
            if has_begun:
                raise
            if (told := errors.of(error)).status == 500:
                log.error("%s: %s", request_id, type(error).__name__, exc_info=error)
            await _failure(told, self.endpoint)(scope, receive, sending)

    async def _body(self, request: Request) -> bodies.Body | None:
        model, bounds = self.endpoint.body, self._service.settings.bounds
        if model is None:
            return None
        raw = await bodies.received(request, bounds)
        if len(raw) < LARGE:
            return bodies.parse(raw, model, bounds)
        return await self._service.in_pool(bodies.parse, raw, model, bounds)

    async def _answer(self, request: Request, body: Any, send: Send) -> None:
        response = await self.endpoint.handler(self._service, request, body)
        await response(request.scope, request.receive, send)


def _failure(error: ApiError, endpoint: Endpoint) -> Response:
    return JSONResponse(endpoint.as_error(error), error.status, error.headers)


async def _while_connected(work: Awaitable[None], receive: Receive) -> None:
    """Does some work. Cancels it if the client goes away."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        working.result()
    finally:
        leaving.cancel()
        if not working.done():
            working.cancel()
            await asyncio.wait({working})
