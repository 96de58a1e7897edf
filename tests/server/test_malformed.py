"""12,000 wrong requests, each in its own way: all are refused at once, with errors in the API's format, and the server
goes on."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import time
from collections import Counter
from urllib.parse import unquote

import pytest
from support.malformed import Malformed, malformed
from support.not_http import not_http
from support.servers import serving, toy
from support.wrong_fields import ROUTES

from qwenkern.server import listening, protocol
from qwenkern.server.models import Models
from qwenkern.server.settings import Bounds, Settings

COUNT, WIRED, HTTP_LEVEL = 12_000, 1_200, 300  # in all; over HTTP; and with malformed HTTP
MOST_BYTES = 64 * 1024
PATIENCE = 1.0  # seconds for each refusal
ATTEMPTS = 3  # a request that is slow only once was slow because the machine was busy
BOUNDS = Bounds(body_bytes=MOST_BYTES, messages=64, prompts=16)
SETTINGS = Settings(bounds=BOUNDS)
VALID = [
    Malformed("valid", route.path, json.dumps(body).encode(), statuses=(200,))
    for route in ROUTES
    for body in route.bodies
]


@pytest.fixture(scope="module")
def model():
    with toy() as model:
        model.grammars.prepare()  # as the server does after loading
        yield model


@pytest.fixture(scope="module")
def cases() -> list[Malformed]:
    return list(malformed(COUNT - HTTP_LEVEL, MOST_BYTES))


def fault(case: Malformed, status: int, content_type: str, body: bytes, seconds: float) -> str | None:
    """What is wrong with an answer, or None."""
    if status not in case.statuses:
        return f"status {status}, not {case.statuses}"
    if status == 200:
        return None
    if seconds > PATIENCE:
        return f"{seconds:.1f} s"
    if not content_type.startswith("application/json") or len(body) > 4096:
        return f"content type {content_type}, {len(body)} bytes"
    answer = json.loads(body)
    error = answer["error"]
    if case.is_anthropic:
        if answer.get("type") != "error" or not {"type", "message"} <= error.keys():
            return "not the form of Anthropic's errors"
    elif answer.keys() != {"error"} or error.keys() != {"message", "type", "param", "code"}:
        return "not the form of OpenAI's errors"
    if not isinstance(error["message"], str) or len(error["message"]) < 5 or not isinstance(error["type"], str):
        return "no message or type"
    if any(word in error["message"] for word in ("Traceback", "/work", "site-packages", ".py", "pydantic")):
        return "tells of the server's insides"
    if case.names not in f"{error['message']} {error.get('param')}":
        return f"does not name {case.names}"
    return None


def show(case: Malformed, wrong: str, body: bytes) -> str:
    request = f"{case.method} {case.path[:60]} {case.headers} {case.body[-200:]!r}"
    return f"{case.kind}: {wrong}\n    {request}\n    {body[:200]!r}"


def refuse_none(faults: list[tuple[str, str]]) -> None:
    counts = Counter(kind for kind, _ in faults).most_common()
    one_each = list({kind: text for kind, text in faults}.values())
    assert not faults, f"{len(faults)} faults: {counts}\n" + "\n".join(one_each[:12])


@pytest.mark.slow
def test_each_is_refused_at_once(model, cases: list[Malformed]):
    """Most requests go to the application without a socket."""
    models = Models({"toy": lambda: model})
    models.close = lambda: None  # other tests use the model, too
    app = listening.server(models, SETTINGS).config.app
    faults: list[tuple[str, str]] = []

    async def run() -> None:
        async with app.router.lifespan_context(app):
            for case in [*cases[WIRED:], *VALID]:
                for _ in range(ATTEMPTS):
                    started = time.perf_counter()
                    status, content_type, body = await asked(app, case)
                    if (seconds := time.perf_counter() - started) < PATIENCE:
                        break
                if wrong := fault(case, status, content_type, body, seconds):
                    faults.append((case.kind, show(case, wrong, body)))

    asyncio.run(run())
    refuse_none(faults)


async def asked(app, case: Malformed) -> tuple[int, str, bytes]:
    path, _, query = case.path.partition("?")
    headers = [(name.encode(), value.encode()) for name, value in case.headers]
    if not any(name in ("content-length", "transfer-encoding") for name, _ in case.headers):
        headers.append((b"content-length", str(len(case.body)).encode()))
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": case.method,
        "scheme": "http",
        "path": unquote(path),
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [(b"host", b"127.0.0.1"), *headers],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
        "state": {},
    }
    parts = [case.body[at : at + 16384] for at in range(0, len(case.body), 16384)] or [b""]
    sent: list[dict] = []

    async def receive() -> dict:
        if not parts:
            await asyncio.sleep(3600)  # the client waits for its answer
        part = parts.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(parts)}

    async def send(message: dict) -> None:
        sent.append(message)

    await asyncio.wait_for(app(scope, receive, send), 30)
    start = sent[0]
    content_type = {name.lower(): value for name, value in start["headers"]}.get(b"content-type", b"").decode()
    return start["status"], content_type, b"".join(message.get("body", b"") for message in sent[1:])


@pytest.mark.slow
def test_each_is_refused_at_once_over_http(model, cases: list[Malformed]):
    """Some requests, on connections that stay open as long as the server allows, and bytes that are not HTTP."""
    faults: list[tuple[str, str]] = []
    with serving(model, SETTINGS) as address:
        port = int(address.rpartition(":")[2])
        for kind, sent in not_http(HTTP_LEVEL):
            case = Malformed(kind, "", sent, statuses=(400, 404, 405, 413, 415, 431))
            for _ in range(ATTEMPTS):
                started = time.perf_counter()
                status, content_type, body = over_socket(port, sent)
                if (seconds := time.perf_counter() - started) < PATIENCE:
                    break
            if wrong := fault(case, status, content_type, body, seconds):
                faults.append((kind, show(case, wrong, body)))
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        for case in [*cases[:WIRED], *VALID]:
            for _ in range(ATTEMPTS):
                started = time.perf_counter()
                status, content_type, body = over_http(connection, case)
                if (seconds := time.perf_counter() - started) < PATIENCE:
                    break
            if wrong := fault(case, status, content_type, body, seconds):
                faults.append((case.kind, show(case, wrong, body)))
        connection.close()
    refuse_none(faults)


def over_http(connection: http.client.HTTPConnection, case: Malformed) -> tuple[int, str, bytes]:
    named = {name for name, _ in case.headers}
    connection.putrequest(case.method, case.path.replace("\\", "%5c"), skip_accept_encoding=True)
    for name, value in case.headers:
        connection.putheader(name, value)
    is_chunked = "transfer-encoding" in named
    if not named & {"content-length", "transfer-encoding"}:
        connection.putheader("content-length", str(len(case.body)))
    connection.endheaders(case.body, encode_chunked=is_chunked)
    answer = connection.getresponse()
    body = answer.read()
    if "content-length" in named:  # the rest of the body never comes
        connection.close()
    return answer.status, answer.getheader("content-type", ""), body


def over_socket(port: int, sent: bytes) -> tuple[int, str, bytes]:
    """The status, content type and body of the first answer to some bytes."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused before its end
            connection.sendall(sent)
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        return answer.status, answer.getheader("content-type", ""), answer.read()


def test_headers_that_do_not_end_are_not_waited_for(model, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(protocol, "HEADER_SECONDS", 0.2)
    with serving(model, SETTINGS) as address:
        port = int(address.rpartition(":")[2])
        assert over_socket(port, b"GET /health HTTP/1.1\r\nHost: localhost\r\n")[0] == 408
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            assert connection.recv(1) == b""  # without a request there is no answer
        monkeypatch.setattr(protocol, "HEADER_SECONDS", 1.0)
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            request = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
            connection.sendall(request)
            assert connection.recv(12) == b"HTTP/1.1 200"
            time.sleep(1.2)  # the time limit is for headers, not for idle connections
            connection.sendall(request)
            while connection.recv(1 << 16).count(b"HTTP/1.1 200") == 0:
                pass
