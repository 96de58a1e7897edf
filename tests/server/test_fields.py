"""The server implements every field of OpenAI's API, or refuses it by name."""

from __future__ import annotations

import json
import typing

import httpx
import jsonschema
import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsBase as CompletionParams
from pydantic import BaseModel
from support.servers import serving, toy

from qwenkern.server.bodies import Body
from qwenkern.server.chat import ChatBody
from qwenkern.server.completions import CompletionBody

QUESTION = [{"role": "user", "content": "Hello!"}]
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["colour", "count"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model():
    with toy() as model:
        yield model


@pytest.fixture(scope="module")
def client(model):
    with serving(model) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def chat(client):
    return lambda **body: client.post("/v1/chat/completions", json={"messages": QUESTION, "max_tokens": 40} | body)


@pytest.mark.parametrize(("body", "params"), [(ChatBody, ChatParams), (CompletionBody, CompletionParams)])
def test_every_field_of_the_api_is_known(body: type[Body], params):
    fields = set(typing.get_type_hints(params)) - {"stream"}
    assert fields - set(body.model_fields) - set(body.REFUSED) == set()


@pytest.mark.parametrize("name", ChatBody.REFUSED)
def test_what_is_not_honoured_is_refused_by_name(chat, name):
    for neutral in (*ChatBody.REFUSED[name][0], None):
        assert chat(**{name: neutral}, max_tokens=1).status_code == 200
    answer = chat(**{name: {"some": "value"}})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == name
    assert answer.json()["error"]["code"] == "unsupported_parameter"


def test_the_fields_of_sampling_arrive(chat, model):
    fields = {
        "temperature": 0.9, "top_p": 0.8, "top_k": 40, "min_p": 0.01, "repetition_penalty": 1.1, "seed": 5, "n": 2,
        "presence_penalty": 0.2, "frequency_penalty": 0.3, "min_tokens": 2, "stop": ["zz"], "stop_token_ids": [3],
        "skip_special_tokens": False, "cache_salt": "a", "priority": 1, "ignore_eos": True,
    }  # fmt: skip
    found = chat(**fields, logit_bias={"65": 2.5}, max_tokens=None, max_completion_tokens=20)
    expected = model.chat(QUESTION, **fields, logit_bias={65: 2.5}, max_tokens=20)
    assert [choice["message"]["content"] for choice in found.json()["choices"]] == [each.text for each in expected]


def test_log_probabilities_are_those_of_the_model(chat, model):
    found = chat(logprobs=True, top_logprobs=3, max_tokens=5, temperature=0).json()["choices"][0]["logprobs"]["content"]
    expected = model.chat(QUESTION, logprobs=3, max_tokens=5, temperature=0).logprobs
    assert [each["logprob"] for each in found] == pytest.approx([each.logprob for each in expected])
    assert [bytes(each["bytes"]) for each in found] == [model.tokenizer.token_bytes(each.token_id) for each in expected]
    assert [[top["logprob"] for top in each["top_logprobs"]] for each in found] == [
        pytest.approx(list(each.top.values())) for each in expected
    ]
    streamed = chat(logprobs=True, top_logprobs=3, max_tokens=5, temperature=0, stream=True).text
    chunks = [json.loads(line[6:]) for line in streamed.splitlines() if line and line != "data: [DONE]"]
    own = [each["choices"][0]["logprobs"] for each in chunks]
    assert [token for each in own if each for token in each["content"]] == found


def test_the_cache_is_reported(chat):
    messages = [{"role": "user", "content": "x" * 200}]
    chat(messages=messages, max_tokens=1)
    details = chat(messages=messages, max_tokens=1).json()["usage"]["prompt_tokens_details"]
    assert details["cached_tokens"] >= 128


@pytest.mark.parametrize("form", [
    {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}}},
    {"guided_json": SCHEMA}, {"guided_json": json.dumps(SCHEMA)}, {"structured_outputs": {"json": SCHEMA}},
])  # fmt: skip
def test_an_answer_obeys_its_schema(chat, form):
    for seed in range(4):
        answer = chat(**form, temperature=1.5, seed=seed, max_tokens=400).json()["choices"][0]
        assert answer["finish_reason"] == "stop"
        jsonschema.validate(json.loads(answer["message"]["content"]), SCHEMA)


@pytest.mark.parametrize(("form", "allowed"), [
    ({"guided_choice": ["yes", "no"]}, ["yes", "no"]), ({"structured_outputs": {"choice": ["a"]}}, ["a"]),
    ({"guided_regex": "a{3}b?"}, ["aaa", "aaab"]), ({"guided_grammar": 'start: "p" | "q"'}, ["p", "q"]),
])  # fmt: skip
def test_an_answer_obeys_its_grammar(chat, client, form, allowed):
    for seed in range(3):
        fields = {**form, "temperature": 1.5, "seed": seed}
        assert chat(**fields).json()["choices"][0]["message"]["content"] in allowed
        text = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 9, **fields}).json()["choices"][0][
            "text"
        ]
        assert text in allowed


def test_a_json_object_is_one(chat):
    answer = chat(response_format={"type": "json_object"}, max_tokens=30, temperature=0, seed=1)
    assert answer.json()["choices"][0]["message"]["content"].startswith("{")


@pytest.mark.parametrize(("body", "param"), [
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "lamp"}}}},
     "response_format.json_schema.schema"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "text", "json_schema": {"name": "a"}}}, "response_format.json_schema"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"guided_regex": "("}, "guided_regex"), ({"guided_choice": []}, "guided_choice"),
    ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice"),
    ({"structured_outputs": {"grammar": "start: nothing"}}, "structured_outputs.grammar"),
    ({"guided_regex": "a", "tools": [{"type": "function", "function": {"name": "f"}}]}, "guided_regex"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "lamp"}}},
      "tools": [{"type": "function", "function": {"name": "f"}}]}, "response_format.json_schema.schema"),
    ({"temperature": -1}, "temperature"), ({"temperature": "1"}, "temperature"), ({"n": True}, "n"),
    ({"max_completion_tokens": -1, "max_tokens": None}, "max_completion_tokens"), ({"max_tokens": 0}, "max_tokens"),
    ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"), ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"), ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stop": ["a"] * 17}, "stop"), ({"stop": ""}, "stop"), ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"messages": []}, "messages"), ({"messages": "hi"}, "messages"), ({"messages": [{"role": "user"}]}, "messages"),
    ({"messages": [{"role": "oracle", "content": "a"}]}, "messages.0.role"), ({"messages": None}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
     "messages.0.content.0.type"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "lang": "x"}]}]},
     "messages.0.content.0.lang"),
    ({"messages": [{"role": "user", "content": "a", "tool_call_id": "b"}]}, "messages.0.tool_call_id"),
    ({"messages": [{"role": "user", "content": "a", "tool_calls": [
        {"id": "b", "type": "function", "function": {"name": "f", "arguments": ""}}]}]}, "messages.0.tool_calls"),
    ({"max_tokens": 4, "max_completion_tokens": 5}, "max_completion_tokens"),
    ({"colour" * 900: 1}, None),
])  # fmt: skip
def test_what_is_wrong_is_named(chat, body, param):
    answer = chat(**body)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert len(answer.content) < 1000
    if param:
        assert error["param"] == param
        assert param.split(".")[0] in error["message"]


def test_a_prompt_that_is_too_long_has_a_code_of_its_own(chat):
    for body in ({"max_tokens": 100_000}, {"messages": [{"role": "user", "content": "x" * 1000}]}):
        assert chat(**body).json()["error"]["code"] == "context_length_exceeded"


def test_a_class_of_pydantic_is_parsed(client):
    """OpenAI's client makes the schema of the class, and parses the answer."""
    from openai import OpenAI

    class Colour(BaseModel):
        name: typing.Literal["red", "blue"]

    with OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0) as openai:
        found = openai.chat.completions.parse(model="toy", messages=QUESTION, response_format=Colour, temperature=0)
    assert found.choices[0].message.parsed.name in ("red", "blue")
