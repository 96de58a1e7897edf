"""A program that services.py starts: the server of `qwenkern serve`, with random weights, which need no files."""

from __future__ import annotations

from typing import Annotated

import typer

from qwenkern import Model
from qwenkern.cli import terminal

PATIENCE = 3600  # seconds that a request may wait for its start: 64 callers' prompts keep a CPU busy for minutes


def random_model(size: str, device: str, cache_tokens: int, threads: int | None = None) -> Model:
    """A size of the family in bfloat16."""
    return Model.from_config(size, device=device, dtype="bfloat16", cache_tokens=cache_tokens, threads=threads)


def main(
    model: Annotated[str, typer.Option(help="A size of the family.")],
    device: Annotated[str, typer.Option(help="cpu or cuda.")],
    cache_tokens: Annotated[int, typer.Option(help="Tokens that the key-value cache holds.")],
    port: Annotated[int, typer.Option(help="The port to listen at.")],
    threads: Annotated[int | None, typer.Option(help="Number of CPU threads.")] = None,
) -> None:
    """Serve a model with random weights at 127.0.0.1."""
    from qwenkern.server import listening  # only here: the benchmark itself runs without the extra qwenkern[serve]
    from qwenkern.server.models import Models
    from qwenkern.server.settings import Bounds, Settings
    from qwenkern.server.source import TOGETHER, Source

    def load() -> Model:
        loaded = random_model(model, device, cache_tokens, threads)
        if device == "cuda":
            loaded.warm_up(TOGETHER)
        return loaded

    settings = Settings(port=port, bounds=Bounds(waiting_seconds=PATIENCE))
    bounds = settings.bounds
    listening.run(Models({model: Source.of(load)}, None, bounds.waiting_seconds, bounds.waiting), settings)


if __name__ == "__main__":
    terminal.run(terminal.command(main))
