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

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from . import bodies, errors
from .errors import ApiError
from .service import Service

log = logging.getLogger("qwenkern.server")

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
                model, body = self.endpoint.body, None
                if model:
                    body = await bodies.read(request, model, self._service.settings.bounds)
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
