"""Servers on a free port of the loopback interface, for the tests of clients."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from support.engines import PATIENCE, eventually
from support.models import TINY, tiny_model
from support.toy_tokenizer import byte_tokenizer

from qwenkern import Config, Model
from qwenkern.server import listening
from qwenkern.server.models import Models
from qwenkern.server.settings import Bounds, Settings


def toy(config: Config = TINY, **keywords: Any) -> Model:
    """A small random model that reads and writes bytes as text."""
    return tiny_model(config, torch.float32, tokenizer=byte_tokenizer(config.vocab_size), **keywords)


@contextlib.contextmanager
def serving(
    models: Model | Mapping[str, Model] | Models, settings: Settings | None = None, wait: bool = True
) -> Iterator[str]:
    """Serves a model as "toy", models by name, or Models, in a thread. Yields the base URL, without a slash at its end.
    Does not close a Model that it was given. ``wait``: whether to wait until the first model is loaded."""
    if isinstance(models, Model):
        models = {"toy": models}
    if not isinstance(models, Models):
        given = models
        models = Models({name: lambda name=name: given[name] for name in given})
        models.close = lambda: None  # the test may serve them again
    server = listening.server(models, settings or Settings(bounds=Bounds(drain_seconds=5)))
    with socket.socket(proto=socket.IPPROTO_TCP) as listener:  # without the protocol, asyncio sets no TCP_NODELAY
        listener.bind(("127.0.0.1", 0))
        listener.listen(512)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            eventually(lambda: server.started or not thread.is_alive())
            assert server.started, "the server has not started"
            eventually(lambda: models.is_ready or not wait)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(PATIENCE)
            assert not thread.is_alive(), "the server has not stopped"
