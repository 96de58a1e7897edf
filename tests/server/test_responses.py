"""/v1/responses, through OpenAI's own client: text, functions, streams and refusals."""

from __future__ import annotations

import asyncio
import json
from collections import Counter

import httpx
import pytest
from openai import AsyncOpenAI, NotFoundError, OpenAI
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter
from pydantic_core import from_json
from support.engines import check_pages
from support.parrot import parrot
from support.scripted import model_with_tools, saying
from support.servers import serving

QUESTION = "When is high tide in Emden?"
PLACE = {"type": "object", "properties": {"place": {"enum": ["Emden", "Kiel"]}}, "required": ["place"]}
PLACE |= {"additionalProperties": False}
TOOLS = [
    {"type": "function", "name": "tide", "description": "Of today.", "parameters": PLACE},
    {"type": "function", "name": "clock"},
]
BOTH = (
    'Let me look.\n<tool_call>\n{"name": "tide", "arguments": {"place": "Emden"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
)
CALLS = [("tide", '{"place": "Emden"}'), ("clock", "{}")]


@pytest.fixture(scope="module")
def model():
    with model_with_tools() as model:
        yield model
        check_pages(model)


def calls_of(response) -> list[tuple[str, str]]:
    return [(item.name, item.arguments) for item in response.output if item.type == "function_call"]


def answered(client, stream: bool, **fields) -> Response:
    """The response, streamed or not."""
    if not stream:
        return client.responses.create(model="toy", **fields)
    with client.responses.stream(model="toy", **fields) as events:
        *_, last = events
        return last.response


# Text


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_that_of_the_model(client, model, stream):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    expected = model.chat(messages, max_tokens=12, temperature=0)
    fields = {"instructions": "Be brief.", "max_output_tokens": 12, "temperature": 0, "metadata": {"a": "b"}}
    events = list(client.responses.create(model="toy", input=QUESTION, stream=True, **fields)) if stream else []
    found = events[-1].response if stream else client.responses.create(model="toy", input=QUESTION, **fields)
    assert found.output_text == expected.text
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") in ("", expected.text)
    assert (found.status, found.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert found.output[0].status == "incomplete"
    assert (found.usage.input_tokens, found.usage.output_tokens) == (expected.num_prompt_tokens, 12)
    assert (found.instructions, found.metadata, found.store) == ("Be brief.", {"a": "b"}, False)


def test_events_come_in_their_order(url, model):
    with saying(model, BOTH):
        answer = httpx.post(f"{url}/v1/responses", json={"input": QUESTION, "tools": TOOLS, "stream": True}, timeout=60)
    events = [dict(line.split(": ", 1) for line in event.split("\n")) for event in answer.text.strip().split("\n\n")]
    data = [json.loads(event["data"]) for event in events]
    known = TypeAdapter(ResponseStreamEvent)
    for each in data:
        known.validate_python(each)
    assert [each["sequence_number"] for each in data] == list(range(len(data)))
    assert [each["type"] for each in data] == [event["event"] for event in events]
    kinds = [each["type"].removeprefix("response.") for each in data]
    deltas = kinds.count("output_text.delta")
    assert deltas > 3
    calls = [
        ["output_item.added", *["function_call_arguments.delta"] * count, "function_call_arguments.done"]
        for count in Counter(each["output_index"] for each in data if "arguments.delta" in each["type"]).values()
    ]
    assert len(calls[0]) > 4
    ends = ["output_text.done", "content_part.done", "output_item.done"]
    text = ["output_item.added", "content_part.added", *["output_text.delta"] * deltas, *ends]
    assert kinds == ["created", "in_progress", *text, *calls[0], ends[-1], *calls[1], ends[-1], "completed"]
    assert [each["output_index"] for each in data if each["type"].endswith("item.done")] == [0, 1, 2]
    assert data[-1]["response"]["output"] == [each["item"] for each in data if each["type"].endswith("item.done")]


@pytest.mark.parametrize("stream", [False, True])
def test_text_and_calls_keep_their_order(client, model, stream):
    said = BOTH.replace("</tool_call>\n<tool_call>", "</tool_call>\nAnd the time.\n<tool_call>") + "That is all."
    with saying(model, said):
        output = answered(client, stream, input=QUESTION, tools=TOOLS).output
    found = [item.name if item.type == "function_call" else item.content[0].text.strip() for item in output]
    assert found == ["Let me look.", "tide", "And the time.", "clock", "That is all."]


def test_whole_responses_are_of_the_form_that_is_documented(url, model):
    with saying(model, BOTH):
        body = httpx.post(f"{url}/v1/responses", json={"input": QUESTION, "tools": TOOLS}, timeout=60).json()
    Response.model_validate(body, strict=True)
    assert (body["status"], body["error"], body["model"]) == ("completed", None, "toy")


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(client, model, stream):
    expected = model.chat([{"role": "user", "content": QUESTION}], max_tokens=6, temperature=0, logprobs=2)
    fields = {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "temperature": 0, "max_output_tokens": 6}
    found = answered(client, stream, input=QUESTION, **fields).output[0].content[0].logprobs
    assert [each.logprob for each in found] == pytest.approx([each.logprob for each in expected.logprobs], abs=1e-5)
    assert {len(each.top_logprobs) for each in found} <= {2, 3}


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_of_a_schema(client, stream):
    class Tide(BaseModel):
        high: bool

    schema = {**Tide.model_json_schema(), "additionalProperties": False}
    form = {"format": {"type": "json_schema", "name": "Tide", "schema": schema, "strict": True}}
    answer = answered(client, stream, input=QUESTION, text=form)
    assert isinstance(Tide.model_validate_json(answer.output_text), Tide)
    parsed = client.responses.parse(model="toy", input=QUESTION, text_format=Tide).output_parsed
    assert isinstance(parsed, Tide)


# Functions


@pytest.mark.parametrize("stream", [False, True])
def test_calls_are_items(client, model, stream):
    with saying(model, BOTH) as read:
        answer = answered(client, stream, input=QUESTION, tools=TOOLS)
    assert [item.type for item in answer.output] == ["message", "function_call", "function_call"]
    assert (answer.output_text, answer.status) == ("Let me look.", "completed")
    assert calls_of(answer) == CALLS
    tools = [{"type": "function", "function": {n: v for n, v in tool.items() if n != "type"}} for tool in TOOLS]
    assert read[0].startswith("".join(f"[{json.dumps(tool)}]" for tool in tools))


@pytest.mark.parametrize("said", ["<tool_call>\n{'name': tide}\n</tool_call>", "High tide is at <3."])
def test_what_is_not_a_call_is_text(client, model, said):
    with saying(model, said):
        answer = client.responses.create(model="toy", input=QUESTION, tools=TOOLS)
    assert (answer.output_text, [item.type for item in answer.output]) == (said, ["message"])


def test_arguments_come_in_pieces(client, model):
    """The client's accumulator joins them."""
    with saying(model, BOTH), client.responses.stream(model="toy", input=QUESTION, tools=TOOLS) as stream:
        events = [event for event in stream if "function_call_arguments" in event.type]
    first = [event for event in events if event.output_index == 1]
    assert len(first) > 4
    assert [first[-2].snapshot, first[-1].arguments] == [CALLS[0][1]] * 2


BROKEN = '{"name": "tide", "arguments": {"place": "Emden", high}}'


@pytest.mark.parametrize(
    ("said", "more", "status"),
    [(f"<tool_call>{BROKEN}</tool_call>", {}, "completed"), (BOTH, {"max_output_tokens": 80}, "incomplete")],
)
def test_a_call_that_breaks_off_becomes_text(client, model, said, more, status):
    """A stream has begun the call. Its text follows, as in a whole answer."""
    with saying(model, said, said):
        expected = answered(client, False, input=QUESTION, tools=TOOLS, **more)
        found = answered(client, True, input=QUESTION, tools=TOOLS, **more)
    assert expected.output_text == found.output_text == said[: more.get("max_output_tokens")]
    assert calls_of(expected) == []
    broken = next(item for item in found.output if item.type == "function_call")
    assert (broken.status, broken.name) == ("incomplete", "tide")
    assert from_json(broken.arguments, allow_partial="trailing-strings")["place"] in ("Em", "Emden")
    assert (expected.status, found.status, found.output[-1].status) == (status, status, status)


def test_several_turns(url, model):
    """The client sends the output back as input. The results follow in the order of the calls."""

    async def talk():
        conversation: list = [{"role": "user", "content": [{"type": "input_text", "text": QUESTION}]}]
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            answer = await client.responses.create(model="toy", input=conversation, tools=TOOLS, store=False)
            conversation += answer.output
            for item in reversed(answer.output[1:]):
                told = {"tide": "15:00", "clock": [{"type": "input_text", "text": "12:00"}]}[item.name]
                conversation.append({"type": "function_call_output", "call_id": item.call_id, "output": told})
            return await client.responses.create(model="toy", input=conversation, tools=TOOLS)

    with saying(model, BOTH, "At three.") as read:
        assert asyncio.run(talk()).output_text == "At three."
    called = '<|im_start|>assistant|Let me look.(tide {"place": "Emden"})(clock {})<|im_end|>'
    assert f"{called}<|im_start|>tool|15:00<|im_end|><|im_start|>tool|12:00<|im_end|>" in read[1]


def test_text_after_a_call_goes_back_as_input():
    """The items of a response follow the order of the text, so a message may stand between a call and its result."""
    conversation: list = [{"role": "user", "content": f"[[{BOTH} That is all.]]"}]
    with parrot() as model, serving(model) as url, OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        answer = answered(client, True, input=conversation, tools=TOOLS)
        assert [item.type for item in answer.output] == ["message", "function_call", "function_call", "message"]
        conversation += answer.output
        for item in answer.output[1:3]:
            conversation.append({"type": "function_call_output", "call_id": item.call_id, "output": "[[At three.]]"})
        assert answered(client, False, input=conversation, tools=TOOLS).output_text == "At three."


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "tide"}])
def test_forced_calls_are_right(client, choice, stream):
    """The model has random weights: only the grammar makes its text a call."""
    answer = answered(client, stream, input=QUESTION, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False)
    ((name, arguments),) = calls_of(answer)
    expected = {"tide": [{"place": "Emden"}, {"place": "Kiel"}], "clock": [{}] if choice == "required" else []}
    assert json.loads(arguments) in expected[name]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("text", ['{"high": true}', BOTH.partition("\n")[2], "Hi"])
def test_calls_or_an_answer_of_a_schema(text, stream):
    """The grammar allows nothing else, whatever text the model prefers."""

    class Tide(BaseModel):
        high: bool

    schema = {**Tide.model_json_schema(), "additionalProperties": False}
    form = {"format": {"type": "json_schema", "name": "Tide", "schema": schema}}
    with parrot() as model, serving(model) as url, OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        answer = answered(client, stream, input=f"[[{text}]]", tools=TOOLS, text=form)
    if text.startswith("<"):
        assert (calls_of(answer), answer.output_text) == (CALLS, "")
    else:
        assert calls_of(answer) == []
        assert isinstance(Tide.model_validate_json(answer.output_text), Tide)


# Errors

RESULT = {"type": "function_call_output", "call_id": "a", "output": "x"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"store": True}, "store"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"stream": False, "stream_options": {"include_obfuscation": False}}, "stream_options"),
        ({"text": {"format": {"type": "text", "description": "x"}}}, "text.format"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"metadata": {"a": "x" * 513}}, "metadata.a"),
        ({"metadata": {str(n): "x" for n in range(17)}}, "metadata"),
        ({"colour": 1}, "colour"),
        ({"input": []}, "input"),
        ({"input": [RESULT]}, "call_id"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0.type"),
        ({"input": [{"role": "user"}]}, "input.0.content"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0.type"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"include": ["message.output_text.logprobs"], "top_logprobs": 21}, "top_logprobs"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "x"}}, "tool_choice"),
        (
            {"tools": TOOLS, "text": {"format": {"type": "json_schema", "name": "x", "schema": {"not": {}}}}},
            "text.format.schema",
        ),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"not": {}}}}}, "text.format.schema"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_is_refused(url, fields, param):
    for stream in (False, True):
        answer = httpx.post(f"{url}/v1/responses", json={"input": QUESTION, "stream": stream, **fields}, timeout=60)
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert (error["type"], error["param"]) == ("invalid_request_error", param), error
        assert param.split(".")[-1] in error["message"]


def test_fields_that_ask_for_nothing(client):
    """With the values that a response itself has."""
    reasoning = client.responses.create(model="toy", input=QUESTION, max_output_tokens=1).reasoning.model_dump()
    assert set(reasoning.values()) == {None}
    assert client.responses.create(model="toy", input=QUESTION, max_output_tokens=1, reasoning=reasoning).output


def test_an_unknown_model(client):
    with pytest.raises(NotFoundError):
        client.responses.create(model="other", input=QUESTION)
