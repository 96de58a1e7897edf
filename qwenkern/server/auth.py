"""Who may call: clients with an API key, compared in constant time. A local server without keys takes requests only
for the names of its own machine."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Collection
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from ..errors import shown
from .errors import ApiError

LOCAL = ("127.0.0.1", "localhost", "::1")


class HostMiddleware:
    """Answers 421 to requests whose Host header does not name this machine.

    A server on the loopback interface without keys trusts every program of its machine. A web page there could come
    from a domain that resolves to 127.0.0.1 (DNS rebinding). Its browser would then treat this server as the page's
    own origin."""

    def __init__(self, app: ASGIApp, as_error: Callable[[str, ApiError], dict[str, Any]]) -> None:
        self._app = app
        self._as_error = as_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = Headers(scope=scope).get("host", LOCAL[0]) if scope["type"] == "http" else LOCAL[0]
        name = given[1:].partition("]")[0] if given.startswith("[") else given.partition(":")[0]
        if name.lower() in LOCAL:
            await self._app(scope, receive, send)
            return
        error = ApiError(
            421,
            f"the host is {shown(given)}; expected localhost or 127.0.0.1: other names need a server with an API key",
            kind="invalid_request_error",
            code="wrong_host",
        )
        await JSONResponse(self._as_error(scope["path"], error), error.status)(scope, receive, send)


class KeyMiddleware:
    """Answers 401 to requests without one of the keys, as ``Authorization: Bearer`` or ``x-api-key``."""

    def __init__(
        self,
        app: ASGIApp,
        keys: Collection[str],
        open_paths: Collection[str],
        as_error: Callable[[str, ApiError], dict[str, Any]],
    ) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]
        self._open = open_paths
        self._as_error = as_error  # path, error -> body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._open or self._is_known(Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        error = ApiError(
            401,
            "the API key is missing or wrong; expected it as a bearer token",
            kind="invalid_request_error",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        body = self._as_error(scope["path"], error)
        await JSONResponse(body, error.status, error.headers)(scope, receive, send)

    def _is_known(self, headers: Headers) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = headers.get("x-api-key", "")
        found = False
        for key in self._keys:  # always all keys, so that the time reveals nothing
            found |= hmac.compare_digest(given.strip().encode("utf-8", "replace"), key)
        return found
