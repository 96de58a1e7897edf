"""Streams while the model produces no text: the server sends something, so that proxies and clients do not give up."""

from __future__ import annotations

import asyncio
import json
import socket
from contextlib import aclosing
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from anthropic import Anthropic
from openai import OpenAI
from starlette.requests import ClientDisconnect
from support.engines import check_pages, eventually
from support.parrot import parrot
from support.servers import serving

from qwenkern.server import answering, endpoints, sse
from qwenkern.server.errors import ApiError

MESSAGES = [{"role": "user", "content": "Say [[Hi!]]"}]
CHAT = {"messages": MESSAGES, "stream": True}
BODIES = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"prompt": "[[Hi!]]", "max_tokens": 3, "stream": True},
    "/v1/responses": {"input": "Say [[Hi!]]", "stream": True},
    "/v1/messages": {"messages": MESSAGES, "model": "toy", "max_tokens": 9, "stream": True},
}


@pytest.fixture(scope="module")
def url():
    with parrot() as model, serving(model) as url:
        yield url
        check_pages(model)


@pytest.fixture
def slow(monkeypatch):
    """Makes the model take four intervals to read a prompt, and four for each event."""
    monkeypatch.setattr(sse, "QUIET_SECONDS", 0.05)
    events = answering.events

    async def slowly(*arguments):
        await asyncio.sleep(0.2)
        async with aclosing(events(*arguments)) as found:
            async for event in found:
                await asyncio.sleep(0.2)
                yield event

    monkeypatch.setattr(answering, "events", slowly)


def streamed(url: str, path: str) -> list[str]:
    answer = httpx.post(url + path, json=BODIES[path], timeout=60)
    assert answer.status_code == 200
    assert answer.text.endswith("\n\n")
    return answer.text[:-2].split("\n\n")


@pytest.mark.parametrize("path", BODIES)
def test_a_stream_is_not_silent_for_long(url, slow, path):
    quiet = 'event: ping\ndata: {"type": "ping"}' if path == "/v1/messages" else ": keep-alive"
    events = streamed(url, path)
    assert events[0] == quiet
    begun = next(n for n, event in enumerate(events) if event != quiet)
    assert events[begun:].count(quiet) > (path == "/v1/messages")  # besides the ping after message_start
    assert events[-1] != quiet


@pytest.mark.parametrize("path", BODIES)
def test_a_stream_that_goes_on_has_no_comments(url, path):
    events = streamed(url, path)
    assert ": keep-alive" not in events
    assert sum("ping" in event for event in events) == (path == "/v1/messages")  # Anthropic's streams begin with one


def test_clients_do_not_notice(url, slow):
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        with client.chat.completions.stream(model="toy", messages=MESSAGES) as stream:
            assert stream.get_final_completion().choices[0].message.content == "Hi!"
        with client.responses.stream(model="toy", input="Say [[Hi!]]") as stream:
            assert stream.get_final_response().output_text == "Hi!"
    with (
        Anthropic(base_url=url, api_key="none", max_retries=0) as client,
        client.messages.stream(model="toy", max_tokens=9, messages=MESSAGES) as stream,
    ):
        assert stream.get_final_message().content[0].text == "Hi!"


@pytest.mark.parametrize("seconds", [0.0, 0.3])
def test_an_error_before_the_first_event(url, monkeypatch, seconds):
    """It becomes the status of the response, unless comments have been sent."""
    monkeypatch.setattr(sse, "QUIET_SECONDS", 0.1)

    async def fails(*arguments):
        await asyncio.sleep(seconds)
        raise ApiError(503, "the model is busy", code="waited_too_long")
        yield

    monkeypatch.setattr(answering, "events", fails)
    answer = httpx.post(f"{url}/v1/chat/completions", json=CHAT, timeout=60)
    assert answer.status_code == (200 if seconds else 503)
    assert answer.text.startswith(": keep-alive\n\n") == bool(seconds)
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.APIError, match="the model is busy") as caught:
            list(client.chat.completions.create(model="toy", **CHAT))
        assert isinstance(caught.value, openai.APIStatusError) == (not seconds)


def test_a_client_that_leaves_ends_its_request(url, monkeypatch):
    """Before the response has begun, and after comments only."""
    begun, ended = [], []

    async def waits(*arguments):
        begun.append(True)
        try:
            await asyncio.sleep(60)
            yield
        finally:
            ended.append(True)

    monkeypatch.setattr(answering, "events", waits)
    address, body = urlsplit(url), json.dumps(CHAT)
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        eventually(lambda: begun)
    eventually(lambda: len(ended) == 1)
    monkeypatch.setattr(sse, "QUIET_SECONDS", 0.2)
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=CHAT, timeout=60) as answer:
        assert next(answer.iter_text()) == ": keep-alive\n\n"
    eventually(lambda: len(ended) == 2)


def test_a_client_that_leaves_before_the_headers_are_sent_ends_its_request(monkeypatch):
    monkeypatch.setattr(sse, "QUIET_SECONDS", 0.01)
    ended = []

    async def waits():
        try:
            await asyncio.sleep(60)
            yield b""
        finally:
            ended.append(True)

    async def send(message):
        await asyncio.sleep(60)

    async def body():
        response = await sse.stream(waits(), sse.openai_error)
        sending = asyncio.ensure_future(response({"type": "http"}, None, send))
        await asyncio.sleep(0.01)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        assert ended

    asyncio.run(asyncio.wait_for(body(), 30))


def test_a_lost_cancellation_is_repeated():
    """wait_for of Python 3.11 returns its result, and loses the cancellation, if both come at the same time."""
    cancelled = []

    async def work():
        while len(cancelled) < 2:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                cancelled.append(True)

    async def gone():
        return {"type": "http.disconnect"}

    async def body():
        with pytest.raises(ClientDisconnect):
            await endpoints._while_connected(work(), gone)

    asyncio.run(asyncio.wait_for(body(), 30))
