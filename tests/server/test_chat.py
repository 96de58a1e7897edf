"""/v1/chat/completions: its answers are those of the model when it is called directly."""

from __future__ import annotations

import json
import socket
from urllib.parse import urlsplit

import httpx
import pytest
from support.engines import check_pages
from support.servers import toy

from qwenkern import SamplingParams
from qwenkern.engine import Output
from qwenkern.server import answering

QUESTION = [{"role": "user", "content": "Hello!"}]


@pytest.fixture(scope="module")
def model():
    with toy() as model:
        yield model


def test_an_answer_is_that_of_the_model(client, model):
    found = client.chat.completions.create(model="toy", messages=QUESTION, max_tokens=12, temperature=0)
    expected = model.chat(QUESTION, max_tokens=12, temperature=0)
    assert found.choices[0].message.content == expected.text
    assert found.choices[0].finish_reason == expected.finish_reason
    assert found.usage.completion_tokens == expected.num_tokens
    assert found.usage.prompt_tokens == expected.num_prompt_tokens
    check_pages(model)


def test_a_stream_is_the_same_text(client, model):
    expected = model.chat(QUESTION, max_tokens=12, temperature=0)
    chunks = list(client.chat.completions.create(
        model="toy", messages=QUESTION, max_tokens=12, temperature=0, stream=True,
        stream_options={"include_usage": True},
    ))  # fmt: skip
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == expected.text
    assert chunks[-2].choices[0].finish_reason == expected.finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == expected.num_tokens


@pytest.mark.parametrize("version", ["1.0", "1.1", "1.2"])
def test_a_stream_is_framed_as_the_client_s_version_of_http_wants_it(url, model, version):
    """The server writes the parts of a stream without h11, which writes all other answers."""
    address = urlsplit(url)
    body = json.dumps({"messages": QUESTION, "max_tokens": 12, "temperature": 0, "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/{version}\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        reply = b"".join(iter(lambda: connection.recv(4096), b""))
    fields, _, rest = reply.partition(b"\r\n\r\n")
    parts = []
    if version > "1.0":
        assert b"transfer-encoding: chunked" in fields.lower()
        while rest != b"0\r\n\r\n":
            size, _, rest = rest.partition(b"\r\n")
            parts.append(rest[: int(size, 16)])
            assert rest[len(parts[-1]) :][:2] == b"\r\n"
            rest = rest[len(parts[-1]) + 2 :]
    events = (b"".join(parts) or rest).decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    deltas = [json.loads(event.removeprefix("data: "))["choices"][0]["delta"] for event in events[:-2]]
    assert (
        "".join(delta.get("content", "") for delta in deltas) == model.chat(QUESTION, max_tokens=12, temperature=0).text
    )


def test_tokens_that_come_while_nobody_reads_are_one_event(model):
    first, second = model._requests([[5], [6]], SamplingParams(max_tokens=3))
    outputs = [Output(first, [1], "a"), Output(second, [2], "b"), Output(first, [3, 4], "c", "length")]
    assert answering._joined(outputs) == [Output(first, [1, 3, 4], "ac", "length"), Output(second, [2], "b")]


def test_an_unknown_field_is_refused_by_name(url):
    answer = httpx.post(f"{url}/v1/chat/completions", json={"messages": QUESTION, "colour": "red"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "colour"
