"""Functions in /v1/chat/completions through OpenAI's client: calls, streams of calls, and results."""

from __future__ import annotations

import asyncio
import json

import httpx
import openai
import pytest
from openai import AsyncOpenAI, BadRequestError
from pydantic import BaseModel
from pydantic_core import from_json
from support.engines import check_pages
from support.scripted import model_with_tools, saying

QUESTION = [{"role": "user", "content": "When is high tide in Emden?"}]
PLACE = {"type": "object", "properties": {"place": {"enum": ["Emden", "Kiel"]}}, "required": ["place"]}
PLACE |= {"additionalProperties": False}
TIDE = {"type": "function", "function": {"name": "tide", "description": "Of today.", "parameters": PLACE}}
CLOCK = {"type": "function", "function": {"name": "clock"}}
TOOLS = [TIDE, CLOCK]


def block(name: str, arguments: dict) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


BOTH = f"Let me look.\n{block('tide', {'place': 'Emden'})}\n{block('clock', {})}"


@pytest.fixture(scope="module")
def model():
    with model_with_tools() as model:
        yield model
        check_pages(model)


def calls_of(message) -> list[tuple[str, str]]:
    return [(call.function.name, call.function.arguments) for call in message.tool_calls]


def test_calls_are_parsed_from_the_text(client, model):
    with saying(model, BOTH) as read:
        answer = client.chat.completions.create(model="toy", messages=QUESTION, tools=TOOLS)
    choice = answer.choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me look.")
    assert calls_of(choice.message) == [("tide", '{"place": "Emden"}'), ("clock", "{}")]
    assert len({call.id for call in choice.message.tool_calls}) == 2
    assert read[0].startswith(f"[{json.dumps(TIDE)}][{json.dumps(CLOCK)}]<|im_start|>user|When")


def test_calls_alone_have_no_content(client, model):
    with saying(model, block("clock", {})):
        answer = client.chat.completions.create(model="toy", messages=QUESTION, tools=TOOLS)
    assert answer.choices[0].message.content is None


@pytest.mark.parametrize(
    ("text", "max_tokens", "reason"),
    [
        ("High tide is at <3.", None, "stop"),
        ("Well\n<tool_call>\n{'name': tide}\n</tool_call>", None, "stop"),  # malformed
        (block("tide", {"place": "Emden"}), 40, "length"),  # unfinished
    ],
)
def test_what_is_not_a_call_is_text(client, model, text, max_tokens, reason):
    with saying(model, text, text):
        answer = client.chat.completions.create(model="toy", messages=QUESTION, tools=TOOLS, max_tokens=max_tokens)
        chunks = list(client.chat.completions.create(
            model="toy", messages=QUESTION, tools=TOOLS, max_tokens=max_tokens, stream=True,
        ))  # fmt: skip
    choice = answer.choices[0]
    assert (choice.message.content, choice.message.tool_calls) == (text[:max_tokens], None)
    assert choice.finish_reason == chunks[-1].choices[0].finish_reason == reason
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text[:max_tokens]


def test_streamed_calls_add_up(client, model):
    """The client's accumulator checks each delta."""
    with (
        saying(model, BOTH),
        client.chat.completions.stream(model="toy", messages=QUESTION, tools=TOOLS) as stream,
    ):
        kinds = [event.type for event in stream]
        completion = stream.get_final_completion()
    assert {"content.delta", "tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= {*kinds}
    choice = completion.choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me look.")
    assert calls_of(choice.message) == [("tide", '{"place": "Emden"}'), ("clock", "{}")]
    assert [call.index for call in choice.message.tool_calls] == [0, 1]


def test_arguments_come_in_pieces(client, model):
    """First the id, the type and the name, then pieces that join to the arguments of a whole answer."""
    spelled = BOTH.replace('{"place": "Emden"}', r'{"place":  "E\u006dden", "at": [1.50, {"a": "x\"y"}]}')
    with saying(model, spelled, spelled):
        answer = client.chat.completions.create(model="toy", messages=QUESTION, tools=TOOLS)
        chunks = list(client.chat.completions.create(model="toy", messages=QUESTION, tools=TOOLS, stream=True))
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert [delta.index for delta in deltas] == sorted(delta.index for delta in deltas)
    for index, call in enumerate(answer.choices[0].message.tool_calls):
        first, *rest = [delta for delta in deltas if delta.index == index]
        assert (first.type, first.function.name, first.function.arguments) == ("function", call.function.name, "")
        assert first.id.startswith("call_")
        assert {(each.id, each.type, each.function.name) for each in rest} == {(None, None, None)}
        assert "".join(each.function.arguments for each in rest) == call.function.arguments
        assert all(each.function.arguments for each in rest)
        assert index or len(rest) > 3
    assert calls_of(answer.choices[0].message)[0][1] in spelled


@pytest.mark.parametrize(
    ("text", "max_tokens", "reason"),
    [
        (block("tide", {"place": "Emden"}).replace("}}", ", high}}"), None, "stop"),
        (block("tide", {"place": "Emden"}).replace("}}", "}, high}"), None, "stop"),
        (BOTH.replace("{}", "{]}"), None, "tool_calls"),
        (block("tide", {"place": "Emden"}), 60, "length"),
    ],
)  # fmt: skip
def test_a_call_that_breaks_off_becomes_text(client, model, text, max_tokens, reason):
    """A stream has begun the call. Its text follows, so the content is that of a whole answer."""
    fields = {"model": "toy", "messages": QUESTION, "tools": TOOLS, "max_tokens": max_tokens}
    with saying(model, text, text):
        answer = client.chat.completions.create(**fields).choices[0]
        with client.chat.completions.stream(**fields) as stream:
            list(stream)
            streamed = stream.current_completion_snapshot.choices[0]
    *whole, broken = streamed.message.tool_calls
    assert calls_of(answer.message) if whole else answer.message.tool_calls is None
    assert [call.function.arguments for call in whole] == [found for _, found in whole and calls_of(answer.message)]
    from_json(broken.function.arguments, allow_partial=True)  # the beginning of a JSON object
    with pytest.raises(ValueError, match="EOF"):
        from_json(broken.function.arguments)
    assert streamed.message.content == answer.message.content
    assert "<tool_call>" in answer.message.content
    assert streamed.finish_reason == answer.finish_reason == reason


def test_streamed_text_never_holds_a_tag(client, model):
    with saying(model, BOTH):
        chunks = list(client.chat.completions.create(model="toy", messages=QUESTION, tools=TOOLS, stream=True))
    contents = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
    assert len(contents) > 3
    assert "".join(contents) == "Let me look."
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["tool_calls"]


def test_tokens_of_calls_have_logprobs(client, model):
    with saying(model, BOTH, BOTH):
        answer = client.chat.completions.create(model="toy", messages=QUESTION, tools=TOOLS, logprobs=True)
        chunks = list(
            client.chat.completions.create(model="toy", messages=QUESTION, tools=TOOLS, logprobs=True, stream=True)
        )
    tokens = [each.token for each in answer.choices[0].logprobs.content]
    assert "".join(tokens) == BOTH
    streamed = [chunk.choices[0].logprobs.content for chunk in chunks if chunk.choices[0].logprobs]
    assert [each.token for part in streamed for each in part] == tokens


def test_several_turns(url, model):
    """Results in any order reach the model in the order of the calls. Arguments are rendered as JSON once."""

    async def talk():
        conversation: list = [*QUESTION]
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            answer = await client.chat.completions.create(model="toy", messages=conversation, tools=TOOLS)
            conversation.append(answer.choices[0].message)
            for call in reversed(answer.choices[0].message.tool_calls):
                result = {"tide": "15:00", "clock": "12:00"}[call.function.name]
                conversation.append({"role": "tool", "tool_call_id": call.id, "content": result})
            return await client.chat.completions.create(model="toy", messages=conversation, tools=TOOLS)

    with saying(model, BOTH, "At three.") as read:
        answer = asyncio.run(talk())
    assert answer.choices[0].message.content == "At three."
    assert answer.choices[0].finish_reason == "stop"
    called = '<|im_start|>assistant|Let me look.(tide {"place": "Emden"})(clock {})<|im_end|>'
    assert f"{called}<|im_start|>tool|15:00<|im_end|><|im_start|>tool|12:00<|im_end|>" in read[1]


# The choice


@pytest.mark.parametrize("seed", range(4))
def test_required_calls_are_right(client, seed):
    """The model has random weights: only the grammar makes its text a call."""
    answer = client.chat.completions.create(
        model="toy", messages=QUESTION, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, seed=seed
    )
    choice = answer.choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    (call,) = choice.message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert (call.function.name, arguments) in [("clock", {}), ("tide", {"place": "Emden"}), ("tide", {"place": "Kiel"})]


@pytest.mark.parametrize("name", ["tide", "clock"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_function_by_name(client, name, stream):
    choice = {"type": "function", "function": {"name": name}}
    fields = {"model": "toy", "messages": QUESTION, "tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False}
    if stream:
        with client.chat.completions.stream(**fields) as streamed:
            message = streamed.get_final_completion().choices[0].message
    else:
        message = client.chat.completions.create(**fields).choices[0].message
    assert [call.function.name for call in message.tool_calls] == [name]


def test_strict_functions_of_the_client_are_parsed(client):
    """The client makes the schema of a class, and parses the arguments as that class."""

    class Tide(BaseModel):
        hours: bool
        nested: list[bool]

    tool = openai.pydantic_function_tool(Tide)
    tool["function"]["parameters"]["$defs"] = {"Two": {"type": "array", "maxItems": 2, "items": {"type": "boolean"}}}
    tool["function"]["parameters"]["properties"]["nested"] = {"$ref": "#/$defs/Two"}
    answer = client.chat.completions.parse(
        model="toy", messages=QUESTION, tools=[tool], tool_choice="required", parallel_tool_calls=False
    )
    parsed = answer.choices[0].message.tool_calls[0].function.parsed_arguments
    assert isinstance(parsed, Tide)


def test_a_forced_call_beside_a_form_is_a_call(client):
    form = {"type": "json_object"}
    fields = {"tools": [CLOCK], "tool_choice": "required", "parallel_tool_calls": False, "response_format": form}
    answer = client.chat.completions.create(model="toy", messages=QUESTION, **fields)
    assert calls_of(answer.choices[0].message) == [("clock", "{}")]


@pytest.mark.parametrize("strict", [None, True])
@pytest.mark.parametrize("parallel", [None, False])
def test_when_free_text_has_a_grammar(url, model, strict, parallel):
    """Strict functions and single calls need a grammar. Other answers run without its cost."""
    made, params = model._requests, []
    model._requests = lambda *arguments: params.append(arguments[1]) or made(*arguments)
    try:
        function = {"name": "clock", **({} if strict is None else {"strict": strict})}
        body = {"messages": QUESTION, "tools": [{"type": "function", "function": function}], "max_tokens": 2}
        body |= {} if parallel is None else {"parallel_tool_calls": parallel}
        assert httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).status_code == 200
    finally:
        del model._requests
    assert (params[0].grammar is not None) == bool(strict or parallel is False)


def test_no_functions_are_shown_with_the_choice_none(client, model):
    text = block("clock", {})
    with saying(model, text) as read:
        answer = client.chat.completions.create(model="toy", messages=QUESTION, tools=TOOLS, tool_choice="none")
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (text, "stop")
    assert "Of today." not in read[0]


def functions(**schemas: dict) -> list[dict]:
    """Tools by name, each with the schema of its arguments."""
    return [{"type": "function", "function": {"name": name, "parameters": each}} for name, each in schemas.items()]


RESULT = {"role": "tool", "tool_call_id": "a", "content": "x"}
CALLED = {
    "role": "assistant",
    "tool_calls": [{"id": "b", "type": "function", "function": {"name": "f", "arguments": ""}}],
}


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice", "'any'; expected 'none', 'auto', 'required' or"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "tide"}}, "tool_choice", "expected 'none'"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "t"}}}, "tool_choice", "'t', which"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools"}}, "tool_choice", "expected 'none'"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "tide"}, "mode": "auto"}},
            "tool_choice",
            "expected 'none'",
        ),
        ({"tools": [TIDE, TIDE]}, "tools", "tools has tide twice"),
        ({"tools": [CLOCK] * 129}, "tools", "129 functions; expected at most 128"),
        ({"tools": [{"type": "custom", "custom": {}}]}, "tools.0.type", "custom"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name", "a b"),
        ({"tools": [{"type": "function", "function": {"name": "f", "extra": 1}}]}, "tools.0.function.extra", "extra"),
        ({"messages": [*QUESTION, RESULT]}, "tool_call_id", "tool_call_id of a result is 'a'"),
        ({"messages": [CALLED, RESULT]}, "tool_call_id", "tool_call_id of a result is 'a'"),
        ({"messages": [{**CALLED, "tool_calls": [{"id": "b"}]}]}, "messages.0.tool_calls.0.function", "missing"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]}
            | {"tool_choice": "required"},
            "tools",
            "tools[0]: parameters are",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}]}
            | {"tool_choice": "required"},
            "tools",
            'tools: the function f is not supported: failed to compile JSON schema: Unimplemented keys: ["not"]',
        ),
        (
            {"tools": [*TOOLS, *functions(f={"minProperties": 2}, g={"minProperties": 3})], "tool_choice": "required"},
            "tools",
            "tools[2]: parameters is not supported: minProperties 2 with 0 required properties",
        ),
        (
            {"tools": functions(f={"minProperties": 2}, g={"minProperties": 3})}
            | {"tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tools",
            "tools[1]: parameters is not supported: minProperties 3",
        ),
        (
            {"tools": functions(f={}, g={"const": "x" * 2**16}, h={}), "tool_choice": "required"},
            "tools",
            "expected 65536 at most: the largest is tools[1], g",
        ),
    ],
)  # fmt: skip
def test_what_is_refused(client, fields, param, message):
    fields = {"model": "toy", "messages": QUESTION, **fields}
    with pytest.raises(BadRequestError) as caught:
        client.chat.completions.create(**fields)
    assert caught.value.param == param
    assert message in caught.value.message
