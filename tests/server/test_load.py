"""Many clients at once, clients that leave, and clients that do not read: every answer is the same as for a single
client, all pages are released, and memory does not grow."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest
from support.engines import TO_START, check_pages, eventually
from support.memory import in_a_process, needs_resident, resident
from support.models import TINY, save_checkpoint, tiny_model
from support.servers import serving, toy

from qwenkern.benchmarks.models.services import free_port
from qwenkern.server import protocol

pytestmark = pytest.mark.slow

PROMPTS = [f"{n}: what is {n * n} and why? " + "so " * (n % 23) for n in range(40)]
HOW = {"max_tokens": 24, "temperature": 0, "ignore_eos": True}
CLIENTS = 200


def alone(model, **how) -> list[str]:
    """The answer to each prompt when it runs alone."""
    return [model.generate(prompt, **(HOW | how)).text for prompt in PROMPTS]


async def streamed(
    client: httpx.AsyncClient, prompt: str, leave_after: int | None = None, begun: asyncio.Event | None = None, **how
) -> str | None:
    """The text of a stream. With leave_after, disconnects after so many events and returns None. Sets ``begun`` after
    the first event."""
    body = {"model": "toy", "prompt": prompt, "stream": True, **HOW, **how}
    parts, events = [], 0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                return "".join(parts)
            if line.startswith("data: "):  # not a comment
                chunk = json.loads(line.removeprefix("data: "))
                assert "error" not in chunk, chunk
                parts += [choice["text"] for choice in chunk["choices"]]
                events += 1
                if begun:
                    begun.set()
            if events == leave_after:
                return None
    raise AssertionError(f"the stream has ended early: {parts}")


async def many(url: str, count: int, leaving: bool, **how) -> list[str | None]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=120) as client:
        works = [
            streamed(client, PROMPTS[n % len(PROMPTS)], n % 2 + 1 if leaving and n % 3 == 2 else None, **how)
            for n in range(count)
        ]
        return await asyncio.gather(*works)


def check(found: list[str | None], expected: list[str], leaving: bool) -> None:
    for n, text in enumerate(found):
        assert text == (None if leaving and n % 3 == 2 else expected[n % len(PROMPTS)]), n


def a_third_leaves() -> None:
    with toy() as model, serving(model) as url:
        expected = alone(model)
        sizes = []
        for _ in range(3):
            check(asyncio.run(many(url, CLIENTS, leaving=True)), expected, leaving=True)
            check_pages(model)
            sizes.append(resident())
        assert sizes[-1] - sizes[0] < 16 << 20, sizes
        outcomes = model._loop.engine.counts.outcomes
        assert outcomes["length"] + outcomes["abort"] == 3 * CLIENTS + len(PROMPTS)


@needs_resident
def test_a_third_of_many_clients_leaves():
    in_a_process(__file__, "a_third_leaves()")


def test_answers_wait_for_pages():
    with toy(cache_tokens=512) as model, serving(model) as url:
        expected = alone(model, max_tokens=100)
        check(asyncio.run(many(url, 60, leaving=True, max_tokens=100)), expected, leaving=True)
        assert model._loop.engine.counts.preempted > 0, "the cache was not full, so this shows nothing"
        check_pages(model)


def silent(url: str, tokens: int) -> socket.socket:
    """A client that requests a long stream and reads nothing."""
    host, port = url.removeprefix("http://").split(":")
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect((host, int(port)))
    ask = {"model": "toy", "prompt": "Hello", "stream": True, "logprobs": 20, **HOW, "max_tokens": tokens}
    body = json.dumps(ask).encode()
    lines = [
        "POST /v1/completions HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    ]
    client.sendall("\r\n".join([*lines, "", ""]).encode() + body)
    return client


def test_clients_that_do_not_read_block_nobody_and_are_left(monkeypatch):
    monkeypatch.setattr(protocol, "STALLED_SECONDS", 2.0)
    aborted = []
    lost = protocol.Protocol.connection_lost
    monkeypatch.setattr(
        protocol.Protocol, "connection_lost", lambda self, error: (aborted.append(self), lost(self, error))[1]
    )
    config = dataclasses.replace(TINY, max_position_embeddings=4096)
    with toy(config, speculate=False) as model, serving(model) as url:
        expected = alone(model)
        before = len(aborted)
        clients = [silent(url, 1500) for _ in range(8)]
        eventually(lambda: len(model._loop.engine.scheduler.running) == len(clients))
        begun = time.monotonic()
        check(asyncio.run(many(url, 20, leaving=False)), expected, leaving=False)
        assert time.monotonic() - begun < 60
        with httpx.Client(base_url=url) as client:
            assert client.get("/health").status_code == 200
        eventually(lambda: len(aborted) >= before + len(clients))
        check_pages(model)
        for client in clients:
            client.close()


def test_sigterm_lets_streams_end(tmp_path):
    model = tiny_model(dataclasses.replace(TINY, max_position_embeddings=2048))
    save_checkpoint(model, tmp_path / "toy")
    port = free_port()
    command = [sys.executable, "-m", "qwenkern", "serve", "--model", f"toy={tmp_path / 'toy'}", "--port", str(port)]
    server = subprocess.Popen([*command, "--cache-tokens", "4096", "--device", "cpu"], stderr=subprocess.PIPE)
    url = f"http://127.0.0.1:{port}"

    def is_well() -> bool:
        assert server.poll() is None, server.stderr.read()
        try:
            return httpx.get(f"{url}/health").status_code == 200
        except httpx.TransportError:
            return False

    async def body() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            begun = [asyncio.Event() for _ in range(4)]
            streams = [
                asyncio.ensure_future(streamed(client, prompt, begun=event, max_tokens=400))
                for prompt, event in zip(PROMPTS, begun, strict=False)
            ]
            await asyncio.gather(*(event.wait() for event in begun))
            server.send_signal(signal.SIGTERM)
            texts = await asyncio.gather(*streams)
        expected = [each.text for each in reference.generate(PROMPTS[:4], **(HOW | {"max_tokens": 400}))]
        assert texts == expected

    from qwenkern import Model

    reference = Model.from_pretrained(tmp_path / "toy", device="cpu", cache_tokens=4096)
    try:
        eventually(is_well, "it does not start", TO_START)
        asyncio.run(body())
        assert server.wait(30) == -signal.SIGTERM  # uvicorn raises it again after the last answer
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{url}/health")
    finally:
        server.kill()
        server.wait(30)
        reference.close()
