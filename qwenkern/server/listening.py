"""The HTTP server below the application, from the first connection to the last answer."""

from __future__ import annotations

import uvicorn

from . import protocol
from .app import create_app
from .models import Models
from .settings import Settings


def server(models: Models, settings: Settings) -> uvicorn.Server:
    """A server of HTTP that runs the application: its ``run`` listens until SIGTERM or SIGINT. It then takes no more
    connections, and gives those that it has `drain_seconds` to end."""
    config = uvicorn.Config(
        create_app(models, settings),
        host=settings.host,
        port=settings.port,
        http=protocol.Protocol,
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=protocol.MAX_HEADER_BYTES,
        timeout_graceful_shutdown=int(settings.bounds.drain_seconds),
        backlog=1024,
    )
    return uvicorn.Server(config)
