"""`qwenkern serve`: the HTTP server, from the options of the command line."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import RequestError, shown
from ..kernels import environment
from .terminal import note

if TYPE_CHECKING:
    from ..server.settings import Bounds

NEEDED = ("starlette", "uvicorn", "pydantic", "prometheus_client", "llguidance")  # of the extra qwenkern[serve]


def serve(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            metavar="[NAME=]MODEL",
            help="Name, hub id, folder or .gguf file; NAME is what clients call it. May be given several times.",
            show_default="demo",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen at. 0.0.0.0: all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port to listen at.", min=0, max=65535)] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help="A file of keys, one a line: callers must have one of them.", show_default="$QWENKERN_API_KEY"
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="Pages of this origin may call, such as https://example.org, or *. May be given again."),
    ] = None,
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Write the bodies of requests to the log.")
    ] = False,
    bound: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="A bound of docs/serving.md, such as waiting=64. May be given again."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    quantize: Annotated[str | None, typer.Option(help="int8, int4, fp8 or none, as the weights load.")] = None,
    kv_cache_dtype: Annotated[str, typer.Option(help="auto, float16, int8, fp8, or dtype's.")] = "auto",
    cache_tokens: Annotated[int | None, typer.Option(help="Tokens that the key-value cache of a model holds.")] = None,
    memory: Annotated[
        float | None,
        typer.Option(
            help="Gigabytes that all models may take together; the least used are unloaded.",
            show_default="of several models: 90 % of what is free",
            min=0.0,
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Number of CPU threads.", show_default="one per physical core")
    ] = None,
) -> None:
    """Serve models over HTTP: the APIs of OpenAI and Anthropic, and a page to try them at /."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise RequestError(f"qwenkern serve needs {' and '.join(missing)}; run pip install 'qwenkern[serve]'")
    from ..server import listening
    from ..server.models import Models
    from ..server.settings import Settings
    from ..server.source import free_memory, source

    options: dict[str, Any] = {
        "device": device,
        "dtype": dtype,
        "quantize": quantize,
        "kv_cache_dtype": kv_cache_dtype,
        "cache_tokens": cache_tokens,
        "threads": threads,
    }
    models = named(model or ["demo"])
    if memory is None and len(models) > 1:
        most: int | None = free_memory(device)
    else:
        most = None if memory is None else int(memory * 1e9)
    settings = Settings(host, port, keys(api_key_file), tuple(cors_origin or ()), log_prompts, bounds_of(bound or []))
    if not settings.api_keys and host not in ("127.0.0.1", "::1", "localhost"):
        note("[yellow]warning:[/] everybody who reaches this address may call: there is no --api-key-file")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    bounds, sources = settings.bounds, {name: source(path, **options) for name, path in models.items()}
    listening.run(Models(sources, most, bounds.waiting_seconds, bounds.waiting), settings)


def named(models: list[str]) -> dict[str, str]:
    """The name of each model for clients -> the name, path or hub id that loads it."""
    found: dict[str, str] = {}
    for model in models:
        name, given, path = model.partition("=")
        if not given or Path(model).exists():
            path = model
            name = Path(model).resolve().name if Path(model).exists() else model
        if not name or not path or name in found:
            raise RequestError(f"--model is {shown(model)}; expected MODEL or NAME=MODEL, each name once")
        found[name] = path
    return found


def keys(file: Path | None) -> tuple[str, ...]:
    """The API keys of a file and of the environment."""
    found = [environment.API_KEY.get() or ""]
    if file is not None:
        try:
            found += file.read_text("utf-8").splitlines()
        except UnicodeDecodeError:
            raise RequestError(f"{file} is not text; expected one API key a line") from None
        if not any(line.strip() for line in found[1:]):
            raise RequestError(f"{file} has no API key; expected one a line")
    found = [key.strip() for key in found if key.strip()]
    for key in found:
        if not key.isascii() or not key.isprintable() or " " in key:
            raise RequestError("an API key has blanks, or characters that are not ASCII; expected one key a line")
    return tuple(dict.fromkeys(found))


def bounds_of(given: list[str]) -> Bounds:
    """The server's default bounds, with those replaced that are given as NAME=VALUE."""
    from ..server.settings import Bounds

    defaults = dataclasses.asdict(Bounds())
    values: dict[str, float] = {}
    for text in given:
        name, _, number = text.partition("=")
        if name not in defaults:
            raise RequestError(f"--bound is {shown(text)}; expected NAME=VALUE with one of: {', '.join(defaults)}")
        try:
            values[name] = type(defaults[name])(number)
        except ValueError:
            values[name] = -1
        if not 0 < values[name] < 2**53:
            kind = "whole number" if isinstance(defaults[name], int) else "number of seconds"
            raise RequestError(f"--bound is {shown(text)}; expected a {kind} above 0")
    return Bounds(**values)  # type: ignore[arg-type]
