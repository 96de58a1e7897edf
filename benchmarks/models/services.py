"""The engines of serving.py: each takes requests of several callers at any time, and gives tokens as they come."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import importlib.util
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from qwenkern import Model, SamplingParams
from qwenkern.benchmarks.models import llama_cpp, peers
from qwenkern.engine import Call

READY = 120  # seconds in which a server must have loaded its model


class Service(Protocol):
    """An engine that is ready."""

    def stream(self, prompt: list[int], new: int) -> Iterator[int]:
        """Generates ``new`` tokens after a prompt, greedily. Yields how many have come, whenever some have."""


class Qwenkern:
    def __init__(self, model: Model) -> None:
        self._model = model

    def stream(self, prompt: list[int], new: int) -> Iterator[int]:
        params = SamplingParams(max_tokens=new, temperature=0, repetition_penalty=1.0, ignore_eos=True)
        [request] = self._model._requests([prompt], params)
        request.is_streamed = True
        with Call(self._model._loop, [request]) as call:
            for output in call:
                yield len(output.token_ids)


class LlamaServer:
    """llama.cpp's server over HTTP on loopback."""

    def __init__(self, port: int) -> None:
        self._port = port

    def stream(self, prompt: list[int], new: int) -> Iterator[int]:
        body = {
            "prompt": prompt,
            "n_predict": new,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
            "stream": True,
            "timings_per_token": True,  # an event has no tokens of its own while a character is not whole
        }
        seen = 0
        for event in _events(self._port, "/completion", body):
            count = event["timings"]["predicted_n"]
            if count > seen:
                yield count - seen
            seen = count


class QwenkernServer:
    """`qwenkern serve` over HTTP on loopback."""

    def __init__(self, port: int) -> None:
        self._port = port

    def stream(self, prompt: list[int], new: int) -> Iterator[int]:
        body = {
            "prompt": prompt,
            "max_tokens": new,
            "temperature": 0,
            "repetition_penalty": 1.0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        for event in _events(self._port, "/v1/completions", body):
            if count := len(event["choices"][0]["token_ids"]):
                yield count


def _events(port: int, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The events of a streamed answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    if answer.status != 200:
        raise RuntimeError(f"{path} answered {answer.status}: {answer.read(300)!r}")
    for line in answer:
        if line.startswith(b"data: {"):
            yield json.loads(line[6:])
    connection.close()


@contextmanager
def llama_server(file: Path, threads: int, callers: int, tokens: int) -> Iterator[LlamaServer]:
    """The server with a slot of ``tokens`` for each caller. Raises FileNotFoundError if it is not installed."""
    program = llama_cpp.find("llama-server")
    port = _free_port()
    context = callers * (-(-tokens // 256) * 256)
    options = ["--parallel", callers, "--ctx-size", context, "--threads", threads, "--port", port, "--no-webui"]
    command = [program, "--model", str(file), *map(str, options), *llama_cpp.SETTINGS]
    with _running(command, port):
        yield LlamaServer(port)


@contextmanager
def qwenkern_server(model: str, threads: int, cache_tokens: int) -> Iterator[QwenkernServer]:
    """`qwenkern serve` as users start it. Raises FileNotFoundError if the extra qwenkern[serve] is not installed."""
    if importlib.util.find_spec("uvicorn") is None:
        raise FileNotFoundError("qwenkern serve needs the extra qwenkern[serve]")
    port = _free_port()
    options = [
        "--model",
        model,
        "--device",
        "cpu",
        "--threads",
        threads,
        "--cache-tokens",
        cache_tokens,
        "--port",
        port,
    ]
    with _running([sys.executable, "-m", "qwenkern", "serve", *map(str, options)], port):
        yield QwenkernServer(port)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def _running(command: list[str], port: int) -> Iterator[None]:
    """A server in a process of its own, from when it is healthy."""
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

    def __init__(self, manager: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._manager, self._loop = manager, loop

    def stream(self, prompt: list[int], new: int) -> Iterator[int]:
        results: SimpleQueue[Any] = SimpleQueue()
        name = f"request {id(results)}"

        async def register() -> None:  # results come through the event loop that runs now
            self._manager.register_result_handler(name, results.put)

        asyncio.run_coroutine_threadsafe(register(), self._loop).result()
        self._manager.add_request(prompt, request_id=name, max_new_tokens=new, streaming=True, eos_token_id=-1)
        seen = 0
        while seen < new:
            result = results.get(timeout=600)
            if result.error:
                raise RuntimeError(f"transformers: {result.error}")
            fresh, seen = len(result.generated_tokens) - seen, len(result.generated_tokens)
            if fresh:
                yield fresh


@contextmanager
def transformers(model: Model) -> Iterator[Transformers]:
    from transformers import GenerationConfig

    peer = peers.transformers_model(model)
    manager = peer.init_continuous_batching(GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0))
    manager.start()
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield Transformers(manager, loop)
    finally:
        manager.stop(block=True)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def qwenkern(model: Model) -> AbstractContextManager[Qwenkern]:
    return contextlib.nullcontext(Qwenkern(model))
