"""The server as an ASGI application: the endpoints of each API, with middleware for keys, hosts, CORS and metrics."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..errors import shown
from . import chat, completions, errors, footprint, health, listing, messages, metrics, openapi, page, responses, tokens
from .auth import LOCAL, HostMiddleware, KeyMiddleware
from .endpoints import Endpoint, Served
from .errors import ApiError
from .models import Models
from .service import Service
from .settings import Settings

ENDPOINTS: list[Endpoint] = [
    *chat.ENDPOINTS,
    *completions.ENDPOINTS,
    *responses.ENDPOINTS,
    *messages.ENDPOINTS,
    *listing.ENDPOINTS,
    *tokens.ENDPOINTS,
    *health.ENDPOINTS,
    *metrics.ENDPOINTS,
    *openapi.ENDPOINTS,
    *footprint.ENDPOINTS,
    *page.ENDPOINTS,
]


def create_app(
    models: Models, settings: Settings, on_failure: Callable[[BaseException], None] = lambda _: None
) -> Starlette:
    """The application that serves these models. When it starts, it begins to load the first one. It calls
    ``on_failure`` if this fails, or if a model whose engine has stopped cannot be loaded again."""
    service = Service(models, settings)
    models.on_loss = on_failure

    def report(loading: asyncio.Future[None]) -> None:
        if not loading.cancelled() and (error := loading.exception()):
            on_failure(error)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        loading = asyncio.ensure_future(models.start())
        loading.add_done_callback(report)
        try:
            yield
        finally:
            loading.cancel()
            service.close()

    watched = metrics.Metrics(models)
    middleware = [Middleware(metrics.CountResponses, counts=watched.responses)]
    if settings.cors_origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(settings.cors_origins),
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=["x-request-id"],
            )
        )
    if settings.api_keys:
        open_paths = {each.path for each in ENDPOINTS if each.is_open}
        middleware.append(Middleware(KeyMiddleware, keys=settings.api_keys, open_paths=open_paths, as_error=_as_error))
    elif settings.host in LOCAL:
        middleware.insert(0, Middleware(HostMiddleware, as_error=_as_error))
    app = Starlette(
        routes=[Route(each.path, Served(each, service), methods=[each.method]) for each in ENDPOINTS],
        middleware=middleware,
        exception_handlers={HTTPException: _http_error, Exception: _internal_error},
        lifespan=lifespan,
    )
    app.state.service = service
    app.state.metrics = watched
    app.state.openapi = openapi.document(ENDPOINTS, has_keys=bool(settings.api_keys))
    return app


def _as_error(path: str, error: ApiError) -> dict[str, Any]:
    """The body of an error in the format of the API that the path belongs to."""
    form = next((each.as_error for each in ENDPOINTS if each.path == path), errors.openai_body)
    return form(error)


async def _http_error(request: Request, error: Exception) -> Response:
    """The response for starlette's own errors, such as 404 and 405, which reach no endpoint."""
    assert isinstance(error, HTTPException)
    path, method = request.url.path, request.method
    messages = {404: f"there is no {shown(path)} here", 405: f"{shown(path)} does not take {shown(method)}"}
    codes = {404: "unknown_url", 405: "method_not_supported"}
    known = ApiError(
        error.status_code,
        messages.get(error.status_code, error.detail),
        kind="invalid_request_error",
        code=codes.get(error.status_code),
        headers=error.headers,
    )
    return JSONResponse(_as_error(path, known), known.status, known.headers)


async def _internal_error(request: Request, error: Exception) -> Response:
    known = errors.of(error)
    return JSONResponse(_as_error(request.url.path, known), known.status, known.headers)
