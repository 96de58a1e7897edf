"""Runs the application in uvicorn until a signal."""

from __future__ import annotations

import math
import resource

import uvicorn

from ..errors import Error
from . import protocol
from .app import create_app
from .models import Models
from .settings import Settings

FILES = 128  # open files that the process needs beside its connections


class Server(uvicorn.Server):
    """Listens until SIGTERM or SIGINT. Then it takes no more connections, and running requests have `drain_seconds` to
    end."""

    failure: BaseException | None = None  # why the first model could not be loaded, or a stopped one not again

    def fail(self, error: BaseException) -> None:
        self.failure = error
        self.should_exit = True


def run(models: Models, settings: Settings) -> None:
    """Serves until a signal. Raises Error if the first model cannot be loaded, or if a model whose engine has stopped
    cannot be loaded again."""
    listening = server(models, settings)
    listening.run()
    if listening.failure:
        raise Error(str(listening.failure)) from listening.failure


def server(models: Models, settings: Settings) -> Server:
    """A server that does not listen yet."""
    app = create_app(models, settings, lambda error: found.fail(error))
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=protocol.at_most(_connections(settings.bounds.connections)),
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=protocol.MAX_HEADER_BYTES,
        timeout_graceful_shutdown=math.ceil(settings.bounds.drain_seconds),
        backlog=1024,
    )
    found = Server(config)
    return found


def _connections(most: int) -> int:
    """``most``, or fewer if the system's limit of open files leaves fewer beside FILES, for models and subprocesses."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return most if allowed == resource.RLIM_INFINITY else max(1, min(most, allowed - FILES))
