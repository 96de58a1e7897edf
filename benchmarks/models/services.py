"""The engines of serving.py: each takes requests of several callers at any time, and streams their tokens.

For every engine, all callers are coroutines of one event loop: a thread for each caller would take the processor and
the interpreter's lock from an engine in the same process.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import importlib.util
import json
import random
import socket
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import AbstractContextManager, aclosing, contextmanager
from pathlib import Path
from typing import Any, Protocol

from qwenkern import Model, SamplingParams
from qwenkern.benchmarks.models import llama_cpp, peers, random_server
from qwenkern.engine import AsyncCall

READY = 300  # seconds for a server to load its model, and on a GPU to compile its kernels
SHARE = 0.4  # share of a GPU's free memory for the cache of transformers


class Service(Protocol):
    """An engine that is ready."""

    def stream(self, prompt: list[int], new: int) -> AsyncIterator[int]:
        """Generates ``new`` tokens after a prompt, greedily. Yields the number of new tokens whenever some arrive."""


class Qwenkern:
    def __init__(self, model: Model) -> None:
        self._model = model

    async def stream(self, prompt: list[int], new: int) -> AsyncGenerator[int, None]:
        params = SamplingParams(max_tokens=new, temperature=0, repetition_penalty=1.0, ignore_eos=True)
        [request] = self._model._requests([prompt], params)
        request.is_streamed = True
        async with AsyncCall(self._model._loop, [request]) as call:
            async for output in call:
                yield len(output.token_ids)


class LlamaServer:
    """llama.cpp's server over HTTP on loopback."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def stream(self, prompt: list[int], new: int) -> AsyncGenerator[int, None]:
        body = {
            "prompt": prompt,
            "n_predict": new,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
            "stream": True,
            "timings_per_token": True,  # counts tokens, also in events without text because a character is incomplete
        }
        seen = 0
        async with aclosing(_events(self._port, "/completion", body)) as events:
            async for event in events:
                count = event["timings"]["predicted_n"]
                if count > seen:
                    yield count - seen
                seen = count


class QwenkernServer:
    """`qwenkern serve` over HTTP on loopback."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def stream(self, prompt: list[int], new: int) -> AsyncGenerator[int, None]:
        body = {
            "prompt": prompt,
            "max_tokens": new,
            "temperature": 0,
            "repetition_penalty": 1.0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        async with aclosing(_events(self._port, "/v1/completions", body)) as events:
            async for event in events:
                if count := len(event["choices"][0]["token_ids"]):
                    yield count


async def _events(port: int, path: str, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
    """The events of a streamed answer. Skips the sizes of the HTTP chunks, which are on lines of their own, because no
    server here splits an event between chunks. The work of the callers is part of the measured time."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    content = json.dumps(body).encode()
    fields = f"Host: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\nConnection: close"
    try:
        writer.write(f"POST {path} HTTP/1.1\r\n{fields}\r\n\r\n".encode() + content)
        head = await reader.readuntil(b"\n")
        if (status := head.split()[1]) != b"200":
            raise RuntimeError(f"{path} answered {status.decode()}: {(await reader.read()).decode()[-300:]}")
        rest = b""
        while part := await reader.read(2**16):
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                if line.startswith(b"data: {"):
                    yield json.loads(line[6:])
    finally:
        writer.close()


@contextmanager
def llama_server(file: Path, threads: int, callers: int, tokens: int) -> Iterator[LlamaServer]:
    """The server with a slot of ``tokens`` for each caller. Raises FileNotFoundError if it is not installed."""
    program = llama_cpp.find("llama-server")
    port = free_port()
    context = callers * (-(-tokens // 256) * 256)
    options = ["--parallel", callers, "--ctx-size", context, "--threads", threads, "--port", port, "--no-webui"]
    command = [program, "--model", str(file), *map(str, options), *llama_cpp.SETTINGS]
    with _running(command, port):
        yield LlamaServer(port)


@contextmanager
def qwenkern_server(model: str, device: str, threads: int, cache_tokens: int) -> Iterator[QwenkernServer]:
    """`qwenkern serve` as users start it. Raises FileNotFoundError if the extra qwenkern[serve] is not installed."""
    patient = ["--bound", f"waiting_seconds={random_server.PATIENCE}"]
    with _server(["qwenkern", "serve", *patient], model, device, threads, cache_tokens) as server:
        yield server


@contextmanager
def qwenkern_random_server(size: str, device: str, threads: int, cache_tokens: int) -> Iterator[QwenkernServer]:
    """The same server with the random weights of a size of the family."""
    with _server([random_server.__name__], size, device, threads, cache_tokens) as server:
        yield server


@contextmanager
def _server(module: list[str], model: str, device: str, threads: int, cache_tokens: int) -> Iterator[QwenkernServer]:
    if importlib.util.find_spec("uvicorn") is None:
        raise FileNotFoundError("qwenkern serve needs the extra qwenkern[serve]")
    port = free_port()
    options = ["--model", model, "--device", device, "--threads", threads, "--cache-tokens", cache_tokens]
    with _running([sys.executable, "-m", *module, *map(str, options), "--port", str(port)], port):
        yield QwenkernServer(port)


def free_port() -> int:
    """A port for a server in another process. It is not one of those that the system gives to connections, so none has
    it when the server starts to listen."""
    numbers = random.SystemRandom()  # processes that are forked draw different ones
    while True:
        with contextlib.suppress(OSError), socket.socket() as free:
            free.bind(("127.0.0.1", numbers.randrange(20_000, 32_000)))
            return int(free.getsockname()[1])


@contextmanager
def _running(command: list[str], port: int) -> Iterator[None]:
    """Runs a server in a process of its own. The block begins when the server is healthy."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + READY
        while not _is_healthy(port):
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{command[0]} was not ready after {READY} s, or ended with {process.poll()}")
            time.sleep(0.2)
        yield
    finally:
        process.terminate()
        process.wait(60)


def _is_healthy(port: int) -> bool:
    with contextlib.suppress(OSError, http.client.HTTPException):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    return False


class Transformers:
    """transformers' continuous batching."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager

    async def stream(self, prompt: list[int], new: int) -> AsyncGenerator[int, None]:
        results: asyncio.Queue[Any] = asyncio.Queue()
        name, seen = f"request {id(results)}", 0
        self._manager.register_result_handler(name, results.put_nowait)  # transformers calls it in this event loop
        self._manager.add_request(prompt, request_id=name, max_new_tokens=new, streaming=True, eos_token_id=-1)
        while seen < new:
            result = await results.get()
            if result.error:
                raise RuntimeError(f"transformers: {result.error}")
            fresh, seen = len(result.generated_tokens) - seen, len(result.generated_tokens)
            if fresh:
                yield fresh


@contextmanager
def transformers(model: Model) -> Iterator[Transformers]:
    """transformers with its defaults. On a GPU its cache has less memory than by default, because other engines share
    the GPU."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    peer = peers.transformers_model(model)
    share = SHARE if model.device.type == "cuda" else None
    manager = peer.init_continuous_batching(
        GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
        ContinuousBatchingConfig(max_memory_percent=share),
    )
    manager.start()
    try:
        yield Transformers(manager)
    finally:
        manager.stop(block=True)


def qwenkern(model: Model) -> AbstractContextManager[Qwenkern]:
    return contextlib.nullcontext(Qwenkern(model))
