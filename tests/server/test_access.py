"""Access to the server: keys, missing paths, and how many requests may wait."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
from pydantic import ValidationError
from support.engines import TO_START, Gate, all_free, check_pages, eventually
from support.models import save_checkpoint
from support.servers import serving, toy

from qwenkern.benchmarks.models.services import free_port
from qwenkern.sampling import grammar_compiler
from qwenkern.server import auth, bodies, listening, page, protocol
from qwenkern.server.errors import ApiError
from qwenkern.server.settings import Bounds, Settings

BODY = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 4}
CHAT = "/v1/chat/completions"
HEAD = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {{}}\r\n\r\n"


@pytest.fixture(scope="module")
def model():
    with toy() as model:
        yield model


@pytest.fixture(scope="module")
def plain(model):
    with serving(model) as url:
        yield url


@pytest.fixture(scope="module")
def keyed(model):
    with serving(model, Settings(api_keys=("one", "two"), cors_origins=("https://a.example",))) as url:
        yield url


def error_of(response: httpx.Response, status: int) -> dict:
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize("headers", [
    {}, {"authorization": "Bearer three"}, {"authorization": "one"}, {"authorization": "Basic one"},
    {"authorization": "Bearer"}, {"x-api-key": "onee"}, {"authorization": "Bearer on\u00e9"},
])  # fmt: skip
@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/nothing"])
def test_without_a_key_nothing_is_answered(keyed, path, headers):
    raw = {name: value.encode() for name, value in headers.items()}
    answer = httpx.post(keyed + path, json=BODY, headers=raw)
    assert error_of(answer, 401)["code"] == "invalid_api_key"
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "headers", [{"authorization": "Bearer two"}, {"authorization": "bearer one"}, {"x-api-key": "one"}]
)
def test_each_key_is_taken(keyed, headers):
    assert httpx.post(keyed + CHAT, json=BODY, headers=headers).status_code == 200


def test_keys_are_compared_in_constant_time(monkeypatch):
    compared = []
    monkeypatch.setattr(auth.hmac, "compare_digest", lambda a, b: bool(compared.append((a, b))))
    middleware = auth.KeyMiddleware(None, ("first", "second"), (), None)
    assert not middleware._is_known({"authorization": "Bearer first"})
    assert compared == [(b"first", b"first"), (b"first", b"second")]


def test_pages_of_other_origins_may_not_call_unless_asked(plain, keyed):
    asking = {"origin": "https://a.example", "access-control-request-method": "POST"}
    allowed = httpx.options(keyed + CHAT, headers=asking)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://a.example"
    other = httpx.options(keyed + CHAT, headers=asking | {"origin": "https://b.example"})
    assert "access-control-allow-origin" not in other.headers
    assert "access-control-allow-origin" not in httpx.post(plain + CHAT, json=BODY, headers=asking).headers
    error_of(httpx.options(plain + CHAT, headers=asking), 405)


def test_what_is_not_there_is_an_error_of_the_same_form(plain):
    assert "/v1/nothing" in error_of(httpx.get(f"{plain}/v1/nothing"), 404)["message"]
    answer = httpx.get(plain + CHAT)
    assert "GET" in error_of(answer, 405)["message"]
    assert answer.headers["allow"] == "POST"
    assert error_of(httpx.post(plain + CHAT, json=BODY | {"model": "gpt"}), 404)["code"] == "model_not_found"
    assert error_of(httpx.post(plain + CHAT, content=json.dumps(BODY)), 415)


def streaming(url: str, **options) -> contextlib.AbstractContextManager[httpx.Response]:
    return httpx.stream("POST", url + CHAT, json=BODY | {"stream": True} | options, timeout=60)


def test_a_client_that_goes_away_ends_its_request_within_a_step(plain, model):
    with Gate(model) as gate:
        stepping = threading.Thread(target=gate.steps, args=(4,))
        stepping.start()
        with streaming(plain, max_tokens=400) as response:
            lines = response.iter_lines()  # dropping this closes the connection
            next(lines)
            stepping.join()
        requests = list(model._loop.engine.scheduler.running)
        eventually(lambda: all(request.aborted for request in requests))
        gate.steps(1)  # the step in progress
        eventually(lambda: model.cache.num_free_pages == model.cache.num_pages)
    check_pages(model)


def test_a_client_that_waits_for_a_whole_answer_may_go_away_too(plain, model):
    address = plain.removeprefix("http://").split(":")
    body = json.dumps(BODY | {"max_tokens": 400}).encode()
    head = HEAD.format(len(body))
    with Gate(model) as gate:
        with socket.create_connection((address[0], int(address[1]))) as connection:
            connection.sendall(head.encode() + body)
            gate.steps(3)
            [request] = model._loop.engine.scheduler.running
        eventually(lambda: request.aborted)
    check_pages(model)
    assert len(request.output_ids) < 400


def test_more_requests_than_may_wait_get_429(model):
    settings = Settings(bounds=Bounds(waiting=2, drain_seconds=5))
    with serving(model, settings) as url, contextlib.ExitStack() as stack, Gate(model):
        client = stack.enter_context(httpx.Client(base_url=url, timeout=60))
        answers: list[httpx.Response] = []
        threads = [threading.Thread(target=lambda: answers.append(client.post(CHAT, json=BODY))) for _ in range(2)]
        for thread in threads:
            thread.start()
        eventually(lambda: len(model._loop._sinks) == 2)  # both wait for the first step
        refused = httpx.post(url + CHAT, json=BODY)
        assert error_of(refused, 429)["code"] == "queue_full"
        assert int(refused.headers["retry-after"]) >= 1
        stack.callback(lambda: [thread.join() for thread in threads])
    assert [answer.status_code for answer in answers] == [200, 200]
    check_pages(model)


def test_a_request_that_has_not_started_in_time_gets_503(model):
    with serving(model, Settings(bounds=Bounds(waiting_seconds=0.2, drain_seconds=5))) as url, Gate(model):
        for body in (BODY, BODY | {"stream": True}):
            begin = time.monotonic()
            answer = httpx.post(url + CHAT, json=body, timeout=60)
            assert error_of(answer, 503)["code"] == "waited_too_long"
            assert answer.headers["retry-after"]
            assert time.monotonic() - begin < 10
    eventually(lambda: all_free(model))


def test_a_request_that_has_started_is_not_ended_for_its_length(model):
    with serving(model, Settings(bounds=Bounds(waiting_seconds=2.0, drain_seconds=5))) as url, Gate(model) as gate:
        steps = threading.Thread(target=lambda: (gate.steps(2), time.sleep(2.2), gate.open()))
        steps.start()
        assert httpx.post(url + CHAT, json=BODY, timeout=60).status_code == 200
        steps.join()


def test_a_body_that_does_not_come_is_not_waited_for(model):
    settings = Settings(bounds=Bounds(body_seconds=0.2, drain_seconds=5))
    with serving(model, settings) as url:
        address = url.removeprefix("http://").split(":")
        with socket.create_connection((address[0], int(address[1])), timeout=30) as connection:
            head = HEAD.format(9) + "{"
            connection.sendall(head.encode())
            assert connection.recv(4096).startswith(b"HTTP/1.1 408")
    with serving(model, Settings(bounds=Bounds(body_bytes=1000, drain_seconds=5))) as url:
        large = BODY | {"stop": "x" * 1000}
        assert error_of(httpx.post(url + CHAT, json=large), 413)["code"] == "body_too_large"
        parts = (part for part in [json.dumps(large).encode()] * 2)  # without a length
        headers = {"content-type": "application/json"}
        assert error_of(httpx.post(url + CHAT, content=parts, headers=headers), 413)["code"] == "body_too_large"


def upload(url: str, size: int, sent: int) -> socket.socket:
    """Connects and sends the headers of a request and a part of its body."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=60)
    connection.sendall(HEAD.format(size).encode() + b"{" + b" " * (sent - 1))
    return connection


def test_large_bodies_together_are_bounded(model):
    settings = Settings(bounds=Bounds(bodies_bytes=400_000, drain_seconds=5))
    large = {"content": json.dumps(BODY).ljust(450_000), "headers": {"content-type": "application/json"}}
    with serving(model, settings) as url, httpx.Client(base_url=url, timeout=60) as client:
        with upload(url, 500_000, 200_000):
            refused: list[httpx.Response] = []
            eventually(lambda: refused.append(client.post(CHAT, **large)) or refused[-1].status_code == 429)
            assert error_of(refused[-1], 429)["code"] == "queue_full"
            assert refused[-1].headers["retry-after"]
            assert client.post(CHAT, json=BODY).status_code == 200, "ordinary requests go on"
        for _ in range(2):
            eventually(lambda: client.post(CHAT, **large).status_code == 200, "what has ended still counts")


def test_connections_are_bounded(model):
    settings = Settings(bounds=Bounds(connections=3, drain_seconds=5))
    with serving(model, settings) as url, contextlib.ExitStack() as stack:
        eventually(lambda: is_answered(url))
        idle = [stack.enter_context(upload(url, 100, 10)) for _ in range(3)]
        eventually(lambda: not is_answered(url))
        answers: list[httpx.Response] = []

        def ask() -> bool:
            with contextlib.suppress(httpx.TransportError):
                answers.append(httpx.get(f"{url}/health", timeout=60))
            return bool(answers)

        eventually(ask)
        assert "3 connections" in error_of(answers[0], 503)["message"]
        assert answers[0].headers["retry-after"]
        idle[0].close()
        eventually(lambda: is_answered(url))


@pytest.mark.parametrize(("allowed", "most"), [(200, 72), (20_000, 1024), (resource.RLIM_INFINITY, 1024), (64, 1)])
def test_connections_leave_files_to_the_process(monkeypatch, allowed, most):
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (allowed, allowed))
    assert listening._connections(1024) == most


def is_answered(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):  # the server may close the connection early
        return httpx.get(f"{url}/health", timeout=60).status_code == 200
    return False


def test_the_rest_of_a_refused_body_is_not_waited_for(model, monkeypatch):
    monkeypatch.setattr(protocol, "REST_SECONDS", 0.3)
    with serving(model, Settings(bounds=Bounds(body_bytes=1000, drain_seconds=5))) as url:
        with upload(url, 2000, 10) as connection:
            answer = b""
            while b"body_too_large" not in answer:
                answer += connection.recv(4096)
            begun = time.monotonic()
            with contextlib.suppress(ConnectionError):
                while time.monotonic() < begun + 30:  # the client goes on, a byte at a time
                    connection.sendall(b" ")
                    time.sleep(0.02)
            assert time.monotonic() - begun < 20
        monkeypatch.setattr(protocol, "REST_SECONDS", 1.5)
        with upload(url, 2000, 10) as connection:  # the rest of a body in time keeps the connection open
            answer = b""
            while b"body_too_large" not in answer:
                answer += connection.recv(4096)
            connection.sendall(b" " * 1990)
            time.sleep(1.8)
            connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
            assert connection.recv(12) == b"HTTP/1.1 200"


def test_bodies_in_chunks_of_a_few_bytes_are_refused(plain):
    """The server would take seconds to read them, and do nothing else meanwhile."""
    host, port = plain.removeprefix("http://").split(":")
    head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: {{}}\r\ntransfer-encoding: chunked\r\n\r\n"
    for kind, status in (("application/json", b"400"), ("text/plain", b"415")):  # 415 comes before the body
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            connection.sendall(head.format(kind).encode())
            sent = 0
            with contextlib.suppress(ConnectionError):
                while sent < 8 << 20:
                    connection.sendall(b"1\r\n \r\n" * 1000)
                    sent += 6000
                    if sent == 6000:
                        time.sleep(0.2)  # gives the server time to answer the 415
            assert sent < 8 << 20
            with contextlib.suppress(ConnectionError):
                assert connection.recv(12) in (b"HTTP/1.1 " + status, b"")
    text = json.dumps(BODY).ljust(200_000)
    parts = (text[at : at + 20].encode() for at in range(0, len(text), 20))
    headers = {"content-type": "application/json"}
    assert httpx.post(plain + CHAT, content=parts, headers=headers, timeout=60).status_code == 200


def test_a_request_behind_another_has_the_time_of_its_own_body(model, monkeypatch):
    monkeypatch.setattr(protocol, "REST_SECONDS", 0.3)
    with serving(model) as url:
        host, port = url.removeprefix("http://").split(":")
        body = json.dumps(BODY)
        first = "GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            connection.sendall(f"{first}{HEAD.format(len(body))}{body[:9]}".encode())
            time.sleep(0.8)
            connection.sendall(body[9:].encode())
            answers = b""
            while answers.count(b"HTTP/1.1 200") < 2:
                part = connection.recv(4096)
                assert part, answers
                answers += part


@contextlib.contextmanager
def slow_reader(url: str, path: str) -> Iterator[socket.socket]:
    """Connects with a small receive buffer, and requests a path."""
    host, port = url.removeprefix("http://").split(":")
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(60)
        client.connect((host, int(port)))
        client.sendall(f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode())
        yield client


@pytest.fixture
def small_buffers(monkeypatch):
    """Gives sockets small send buffers. Returns a list that gets each connection when it ends."""
    made, lost, ended = protocol.Protocol.connection_made, protocol.Protocol.connection_lost, []

    def connection_made(self, transport) -> None:
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        made(self, transport)

    monkeypatch.setattr(protocol.Protocol, "connection_made", connection_made)
    monkeypatch.setattr(
        protocol.Protocol, "connection_lost", lambda self, error: (ended.append(self), lost(self, error))[1]
    )
    return ended


def test_the_end_of_an_answer_that_nobody_reads_is_not_waited_for(model, monkeypatch, small_buffers):
    """So few bytes do not pause the stream, and would keep the connection open for ever."""
    monkeypatch.setattr(protocol, "STALLED_SECONDS", 0.3)
    monkeypatch.setattr(page, "_page", lambda: (b"x" * 50_000, {"ETag": "a"}))
    with serving(model) as url:
        before = len(small_buffers)
        with slow_reader(url, "/"):
            eventually(lambda: len(small_buffers) > before, "the connection stays")


def test_a_large_answer_may_be_read_slowly(model, monkeypatch, small_buffers):
    monkeypatch.setattr(protocol, "STALLED_SECONDS", 1.5)
    monkeypatch.setattr(page, "_page", lambda: (b"x" * 1_000_000, {"ETag": "a"}))
    with serving(model) as url, slow_reader(url, "/") as client:
        begun, read = time.monotonic(), 0
        while part := client.recv(4096):
            read += len(part)
            time.sleep(max(0.0, begun + read / 500_000 - time.monotonic()))
        assert read > 1_000_000
        assert time.monotonic() - begun > 1.5


@contextlib.contextmanager
def stuck(url: str, requests: list[tuple[str, dict]], most: int) -> Iterator[list[httpx.Response]]:
    """Sends requests. One must be refused while all others are stuck. Yields the list that gets their answers later."""
    answers: list[httpx.Response] = []

    def ask(path: str, body: dict) -> None:
        answers.append(httpx.post(url + path, json=body, timeout=60))

    threads = [threading.Thread(target=ask, args=each) for each in requests]
    for thread in threads:
        thread.start()
    eventually(lambda: answers)
    refuse(answers.pop(), most)
    yield answers
    for thread in threads:
        thread.join()


def refuse(answer: httpx.Response, most: int) -> None:
    """Checks that an answer is 429 with the limit."""
    assert answer.status_code == 429, answer.text
    assert answer.headers["retry-after"]
    assert f"expected at most {most}" in answer.json()["error"]["message"]


TOKENS = "/v1/messages/count_tokens"
ASIDE = [
    ("/tokenize", {"prompt": "slow"}),
    ("/detokenize", {"tokens": [1]}),
    (TOKENS, {"model": "toy", "messages": [{"role": "user", "content": "slow"}]}),
    ("/v1/completions", {"prompt": "slow", "echo": True, "max_tokens": 0}),
]


def test_those_who_want_tokens_only_keep_nobody_waiting(model, monkeypatch):
    """When as many as may wait are stuck, the server refuses more, and still answers chats."""
    gate, waiting = threading.Event(), []

    def slow(work):
        def waits(*arguments, **keywords):
            if "slow" in str(arguments) or arguments == ([1],):
                waiting.append(arguments)
                assert gate.wait(60)
            return work(*arguments, **keywords)

        return waits

    for name in ("encode_prompt", "encode_chat", "decode"):
        monkeypatch.setattr(model.tokenizer, name, slow(getattr(model.tokenizer, name)))
    with serving(model, Settings(bounds=Bounds(waiting=8, drain_seconds=5))) as url:
        counts: list[int] = []
        with stuck(url, [*ASIDE * 2, ASIDE[0]], 8) as answers:
            for path, body in ASIDE:
                refuse(httpx.post(url + path, json=body, timeout=60), 8)
            assert httpx.post(url + CHAT, json=BODY, timeout=60).status_code == 200
            eventually(lambda: len(waiting) >= 2)
            counts.append(len(waiting))
            gate.set()
        assert counts == [2], "more threads than two are stuck"
        assert [answer.status_code for answer in answers] == [200] * 8


def test_tokens_that_do_not_come_in_time_are_a_503(model, monkeypatch):
    gate = threading.Event()
    encode = model.tokenizer.encode_prompt
    monkeypatch.setattr(model.tokenizer, "encode_prompt", lambda text: (gate.wait(60), encode(text))[1])
    with serving(model, Settings(bounds=Bounds(waiting_seconds=0.2, drain_seconds=5))) as url:
        try:
            answer = httpx.post(f"{url}/tokenize", json={"prompt": "a"}, timeout=30)
        finally:
            gate.set()
        assert error_of(answer, 503)["code"] == "waited_too_long"
        assert answer.headers["retry-after"]


@pytest.mark.parametrize(
    ("path", "body"), [(CHAT, BODY), ("/v1/completions", {"prompt": "slow"}), *ASIDE[:1], *ASIDE[2:]]
)
def test_a_text_that_cannot_fit_is_not_tokenised(model, plain, monkeypatch, path, body):
    monkeypatch.setattr(model.tokenizer, "encode", None)  # it would take seconds for a few megabytes
    most = 32 * model.config.context_length
    if "messages" in body:
        body = body | {"messages": [{"role": "user", "content": "x" * most}]}
    else:
        body = body | {"prompt": "x" * (most + 1)}
    answer = httpx.post(plain + path, json=body, timeout=60)
    assert answer.status_code == 400
    assert f"expected at most {most} characters" in answer.json()["error"]["message"]


def test_new_grammars_keep_only_each_other_waiting(model, monkeypatch):
    gate, tried = threading.Event(), []

    def trial(source: str) -> tuple[str, int]:
        tried.append(source)
        assert gate.wait(60)
        return "it is slow", 0

    def regex(text: str) -> dict:
        return BODY | {"guided_regex": text}

    with serving(model, Settings(bounds=Bounds(grammars=6, drain_seconds=5))) as url:
        assert httpx.post(url + CHAT, json=regex("yes"), timeout=60).status_code == 200
        monkeypatch.setattr(grammar_compiler, "_try", trial)
        bad = [(CHAT, regex(f"a{n}")) for n in range(7)]
        with stuck(url, bad, 6) as answers:
            refuse(httpx.post(url + CHAT, json=regex("b"), timeout=60), 6)
            assert httpx.post(url + CHAT, json=BODY, timeout=60).status_code == 200
            assert httpx.post(url + CHAT, json=regex("yes"), timeout=60).status_code == 200, "it is not new"
            gate.set()
        assert [answer.json()["error"]["param"] for answer in answers] == ["guided_regex"] * 6
        assert len(tried) == 6
        assert [httpx.post(url + path, json=body, timeout=60).status_code for path, body in bad] == [400] * 7
        assert len(tried) == 7, "a grammar that was refused is tried again"


def test_the_log_has_no_prompts_unless_asked(model, caplog):
    caplog.set_level(logging.INFO)
    secret = BODY | {"messages": [{"role": "user", "content": "sesame"}], "user": "a\nb"}
    for asked in (False, True):
        caplog.clear()
        with serving(model, Settings(log_prompts=asked)) as url:
            httpx.post(url + CHAT, json=secret)
            httpx.post(url + CHAT, json=secret | {"temperature": "sesame"})
        assert ("sesame" in caplog.text) is asked
        assert r"user 'a\nb'" in caplog.text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    with toy() as model:
        save_checkpoint(model, folder)
    return folder


@contextlib.contextmanager
def started(folder, *options):
    """Starts `qwenkern serve`. Returns the process and its URL."""
    port = free_port()
    command = [sys.executable, "-m", "qwenkern", "serve", "-m", f"toy={folder}", "--port", str(port), *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            url = f"http://127.0.0.1:{port}"

            def ready() -> bool:
                with contextlib.suppress(httpx.TransportError):
                    return httpx.post(url + CHAT, json=BODY | {"max_tokens": 1}).status_code == 200
                return process.poll() is not None

            eventually(ready, "it does not start", TO_START)
            yield process, url
        finally:
            process.kill()


@pytest.mark.slow
def test_sigterm_lets_requests_end(folder):
    with started(folder) as (process, url):
        with streaming(url, max_tokens=200, ignore_eos=True) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = list(lines)
        assert "data: [DONE]" in rest
        assert any('"finish_reason": "length"' in line for line in rest)
        assert process.wait(30) == -signal.SIGTERM
        with pytest.raises(httpx.TransportError):
            httpx.get(url)


@pytest.mark.slow
def test_sigterm_ends_requests_that_take_too_long(folder):
    with started(folder, "--bound", "drain_seconds=1") as (process, url):
        with streaming(url, max_tokens=480, n=64, ignore_eos=True) as response:
            lines = response.iter_lines()
            next(lines)
            os.kill(process.pid, signal.SIGTERM)
            rest = list(lines)
        assert any("shutting_down" in line for line in rest) or rest[-2] == "data: [DONE]"
        assert process.wait(30) == -signal.SIGTERM


def test_a_server_without_a_key_answers_to_its_own_names_only():
    with serving(toy()) as url:
        port = url.rpartition(":")[2]
        for name in ("localhost", f"127.0.0.1:{port}", "[::1]", f"[::1]:{port}", "LOCALHOST"):
            assert httpx.get(f"{url}/v1/models", headers={"Host": name}).status_code == 200, name
        for name in (
            "evil.example",
            f"evil.example:{port}",
            "127.0.0.1.evil.example",
            "localhost.evil.example",
            "[::2]",
        ):
            answer = httpx.get(f"{url}/v1/models", headers={"Host": name})
            assert (answer.status_code, answer.json()["error"]["code"]) == (421, "wrong_host"), name
    with serving(toy(), Settings(api_keys=("k",))) as url:  # a foreign web page does not know the key
        headers = {"Host": "models.example", "Authorization": "Bearer k"}
        assert httpx.get(f"{url}/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("metadata", "{" + ", ".join(f'"{n}": 1' for n in [*range(100_000), 7]) + "}"),
        ("messages", "[" + "0, " * 200_000 + "0]"),
    ],
    ids=["a key twice", "many faults"],
)
def test_many_faults_take_no_longer_than_one(field, value):
    with serving(toy()) as url:
        begun = time.thread_time()
        answer = httpx.post(
            url + CHAT, content=f'{{"{field}": {value}}}', headers={"Content-Type": "application/json"}, timeout=60
        )
        assert answer.status_code == 400
        assert answer.elapsed.total_seconds() < 10, time.thread_time() - begun


@pytest.mark.parametrize("text", ["a,", "[{", '\\",', "\\\\,:"])
def test_what_a_body_holds_is_counted_beside_its_texts(plain, text):
    """Millions of values would take gigabytes, but a text may have any number of commas."""

    def ask(values: str) -> dict:
        headers = {"content-type": "application/json"}
        return error_of(httpx.post(plain + CHAT, content=values, headers=headers, timeout=60), 400)

    texts, most = json.dumps([text * 200_000]), Bounds().values
    assert ask(f'{{"temperature": {texts}}}')["param"] == "temperature"
    assert ask(f'{{"temperature": {texts}, "n": [{"[], " * (most // 2 - 9)}[]]}}')["param"] == "temperature"
    too_many = ask(f'{{"temperature": {texts}, "n": [{"[], " * (most // 2)}[]]}}')
    assert f"values; expected at most {most}" in too_many["message"]


WRONG = [[]] * 50
SAID = {"role": "user", "content": WRONG}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": WRONG}),
        (CHAT, {"messages": [SAID]}),
        (CHAT, {"messages": [{"role": "assistant", "tool_calls": WRONG}]}),
        *((CHAT, BODY | {name: WRONG}) for name in ("stop", "stop_token_ids", "tools", "guided_choice")),
        (CHAT, BODY | {"structured_outputs": {"choice": WRONG}}),
        ("/v1/completions", {"prompt": [[WRONG]]}),
        *(("/v1/responses", {"input": "a", name: WRONG}) for name in ("include", "tools", "input")),
        ("/v1/responses", {"input": [SAID]}),
        ("/v1/responses", {"input": [{"type": "function_call_output", "call_id": "a", "output": WRONG}]}),
        ("/v1/messages", {"model": "toy", "max_tokens": 1, "messages": [SAID]}),
        *(
            ("/v1/messages", {"model": "toy", "max_tokens": 1, "messages": [], name: WRONG})
            for name in ("messages", "system", "tools", "stop_sequences")
        ),
        ("/tokenize", {"messages": [SAID]}),
        ("/detokenize", {"tokens": WRONG}),
    ],
)
def test_a_list_of_faults_is_read_up_to_the_first(plain, monkeypatch, path, body):
    """pydantic takes a kilobyte and some microseconds for each fault."""
    counts, named = [], bodies._named

    def count(error: ValidationError, fields: dict) -> ApiError:
        counts.append(error.error_count())
        return named(error, fields)

    monkeypatch.setattr(bodies, "_named", count)
    assert httpx.post(plain + path, json=body, timeout=60).status_code == 400
    assert counts
    assert max(counts) < 10
