"""An endpoint, which says what function answers a path and what body it takes, and the ASGI application for it.

request ─► body, within limits ─► handler ─► response
                                     ▲
       client disconnects ── cancels ┘
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from ..errors import shown
from . import bodies, errors
from .admission import SMALL
from .errors import ApiError
from .service import Service

log = logging.getLogger("qwenkern.server")

GONE = 499  # status in the log if the client disconnects before the answer begins
Handler = Callable[[Service, Request, Any], Awaitable[Response]]


@dataclass(frozen=True)
class Endpoint:
    """A path with a method. The handler gets the service, the request, and its body (None if ``body`` is None)."""

    path: str
    method: str
    handler: Handler
    body: type[bodies.Body] | None
    summary: str
    as_error: Callable[[ApiError], dict[str, Any]] = errors.openai_body  # makes the body of an error
    answer: type[BaseModel] | str | None = None  # the body of status 200, or its media type; None: any JSON object
    streams: bool = False  # whether `"stream": true` gives server-sent events
    is_open: bool = False  # whether it needs no API key
    query: Mapping[str, Any] = field(default_factory=dict)  # query parameter -> its JSON schema


class Served:
    """An endpoint as an ASGI application."""

    def __init__(self, endpoint: Endpoint, service: Service) -> None:
        self.endpoint = endpoint
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request, sending, body = Request(scope, receive), _Sending(send), None
        request.state.request_id = sending.request_id
        try:
            with self._service.bodies.one() as grow:
                body = await self._body(request, sending, grow)
                await _while_connected(self._answer(request, body, sending), receive)
        except ClientDisconnect:
            sending.status = sending.status or GONE
        except asyncio.CancelledError:  # the server stops, and drain_seconds are over
            await self._refuse(errors.shutting_down(), sending)
        except Exception as error:
            told = errors.of(error, body.names() if body else None)
            errors.note(error, told, sending.request_id)
            if sending.status:  # the answer has begun: uvicorn closes the connection
                raise
            await self._refuse(told, sending)
        finally:
            seconds = time.monotonic() - sending.began
            log.info("%s %s %d %.3f s %s", scope["method"], self.endpoint.path, sending.status, seconds, sending.label)

    async def _body(self, request: Request, sending: _Sending, grow: Callable[[int], None]) -> bodies.Body | None:
        model, settings = self.endpoint.body, self._service.settings
        if model is None:
            return None
        raw = await bodies.received(request, settings.bounds, grow)
        if settings.log_prompts:
            log.info("%s %r", sending.request_id, raw)
        if len(raw) < SMALL:
            body = bodies.parse(raw, model, settings.bounds)
        else:
            body = await self._service.large.do(bodies.parse, raw, model, settings.bounds)
        if user := getattr(body, "safety_identifier", None) or getattr(body, "user", None):
            sending.label += f" user {shown(user)}"
        return body

    async def _answer(self, request: Request, body: Any, send: Send) -> None:
        response = await self.endpoint.handler(self._service, request, body)
        await response(request.scope, request.receive, send)

    async def _refuse(self, error: ApiError, sending: _Sending) -> None:
        if not sending.status:
            response = JSONResponse(self.endpoint.as_error(error), error.status, error.headers)
            await response({"type": "http"}, _nothing, sending)


class _Sending:
    """Sends a response, and adds the id of the request to its headers."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.request_id = self.label = f"req_{uuid.uuid4().hex}"
        self.began = time.monotonic()
        self.status = 0  # until the response begins

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message["headers"], (b"x-request-id", self.request_id.encode())]
        await self._send(message)


async def _nothing() -> Message:
    return {"type": "http.disconnect"}


async def _while_connected(work: Awaitable[None], receive: Receive) -> None:
    """Awaits some work. Cancels it and raises ClientDisconnect if the client disconnects."""

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
        while not working.done():  # repeated: wait_for of Python 3.11 loses a cancellation that comes as its work ends
            working.cancel()
            await asyncio.wait({working}, timeout=1.0)
