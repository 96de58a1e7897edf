"""/v1/chat/completions: its answers are those of the model called directly."""

from __future__ import annotations

import httpx
import pytest
from support.engines import check_pages
from support.servers import toy

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


def test_an_unknown_field_is_refused_by_name(url):
    answer = httpx.post(f"{url}/v1/chat/completions", json={"messages": QUESTION, "colour": "red"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "colour"
