"""The engines of serving.py: each takes requests of several callers at any time, and gives tokens as they come."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import subprocess
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
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=600)
        connection.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise RuntimeError(f"llama-server answered {answer.status}: {answer.read(300)!r}")
        seen = 0
        for line in answer:
            if line.startswith(b"data: {"):
                count = json.loads(line[6:])["timings"]["predicted_n"]
                if count > seen:
                    yield count - seen
                seen = count
        connection.close()


@contextmanager
def llama_server(file: Path, threads: int, callers: int, tokens: int) -> Iterator[LlamaServer]:
    """The server with a slot of ``tokens`` for each caller. Raises FileNotFoundError if it is not installed."""
    program = llama_cpp.find("llama-server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = callers * (-(-tokens // 256) * 256)
    options = ["--parallel", callers, "--ctx-size", context, "--threads", threads, "--port", port, "--no-webui"]
    command = [program, "--model", str(file), *map(str, options), *llama_cpp.SETTINGS]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + READY
        while not _is_healthy(port):
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"llama-server was not ready after {READY} s, or ended with {process.poll()}")
            time.sleep(0.2)
        yield LlamaServer(port)
    finally:
        process.terminate()
        process.wait(30)


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
