"""The openai client against the server: it shows what the model says."""

from __future__ import annotations

import asyncio
import json
import re

import openai
import pydantic
import pytest
from support.engines import check_pages
from support.parrot import parrot
from support.servers import serving
from support.told import CALL, KEY, OSLO, SETTINGS, City, said
from support.wrong_fields import TOOL


@pytest.fixture(scope="module")
def model():
    with parrot() as model:
        yield model


@pytest.fixture(scope="module")
def url(model):
    with serving({"parrot": model}, SETTINGS) as url:
        yield url + "/v1"
        check_pages(model)


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
        yield client


def test_chat(client, model):
    found = client.chat.completions.create(model="parrot", messages=said("Hei, Åse!"))
    assert found.choices[0].message.content == "Hei, Åse!"
    assert found.choices[0].finish_reason == "stop"
    assert found.usage.completion_tokens == len("Hei, Åse!".encode()) + 1  # and the token that ends the turn
    assert found.usage.prompt_tokens == len(model.tokenizer.encode_chat(said("Hei, Åse!")))
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens


def test_fields(client):
    create = client.chat.completions.create
    cut = create(model="parrot", messages=said("one two three"), max_completion_tokens=5)
    assert (cut.choices[0].message.content, cut.choices[0].finish_reason) == ("one t", "length")
    stopped = create(model="parrot", messages=said("one two three"), stop=["two"])
    assert (stopped.choices[0].message.content, stopped.choices[0].finish_reason) == ("one ", "stop")
    several = create(model="parrot", messages=said("one"), n=3)
    assert [(choice.index, choice.message.content) for choice in several.choices] == [(n, "one") for n in range(3)]
    extra = {"min_p": 0.9, "top_k": 1, "repetition_penalty": 1.0, "ignore_eos": True}
    biased = create(model="parrot", messages=said("a"), logit_bias={"67": 100}, max_tokens=3, extra_body=extra)
    assert biased.choices[0].message.content == "ddd"  # token 67 is byte 100


def test_log_probabilities(client, model):
    found = client.chat.completions.create(model="parrot", messages=said("ab"), logprobs=True, top_logprobs=2)
    expected = model.chat(said("ab"), logprobs=2).logprobs
    content = found.choices[0].logprobs.content
    assert [each.token for each in content][:2] == ["a", "b"]
    assert [each.bytes for each in content][:2] == [[97], [98]]
    assert [each.logprob for each in content] == pytest.approx([each.logprob for each in expected])
    for ours, theirs in zip(content, expected, strict=True):
        assert [top.logprob for top in ours.top_logprobs] == pytest.approx(list(theirs.top.values()))


def test_stream(client):
    options = {"include_usage": True}
    with client.chat.completions.create(
        model="parrot", messages=said("Så det!"), stream=True, stream_options=options
    ) as chunks:
        *chunks, last = chunks
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Så det!"
    assert [chunk.choices[0].finish_reason for chunk in chunks][-2:] == [None, "stop"]
    assert (last.choices, last.usage.completion_tokens) == ([], len("Så det!".encode()) + 1)


def test_async_callers_each_get_their_own(url):
    texts = [f"caller {number}, " * number for number in range(12)]

    async def ask(client: openai.AsyncOpenAI, text: str) -> str:
        stream = await client.chat.completions.create(model="parrot", messages=said(text), stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
            return await asyncio.gather(*(ask(client, text) for text in texts))

    assert asyncio.run(run()) == texts


def test_tools(client):
    """A call, its result, and the answer."""
    messages = said(CALL)
    found = client.chat.completions.create(model="parrot", messages=messages, tools=[TOOL])
    [call] = found.choices[0].message.tool_calls
    assert (found.choices[0].finish_reason, found.choices[0].message.content) == ("tool_calls", None)
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Oslo"})
    messages += [found.choices[0].message.model_dump(exclude_none=True)]
    messages += [{"role": "tool", "tool_call_id": call.id, "content": "[[Rain.]]"}]
    answer = client.chat.completions.create(model="parrot", messages=messages, tools=[TOOL])
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("Rain.", "stop")


def test_tools_streamed(client):
    """Text before two calls. The client joins the deltas."""
    wanted = said(f"Look:\n{CALL}\n{CALL.replace('Oslo', 'Bergen')}")
    with client.chat.completions.stream(model="parrot", messages=wanted, tools=[TOOL]) as stream:
        for _ in stream:
            pass
        message = stream.get_final_completion().choices[0].message
    assert message.content.strip() == "Look:"
    arguments = [json.loads(call.function.arguments) for call in message.tool_calls]
    assert arguments == [{"city": "Oslo"}, {"city": "Bergen"}]
    assert len({call.id for call in message.tool_calls}) == 2


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_tools_that_must_be_called(client, choice):
    """The model prefers another text. The grammar only allows a call with arguments that fit the schema."""
    tool = {"type": "function", "function": {"name": "weather", "parameters": City.model_json_schema()}}
    tool["function"]["parameters"]["properties"]["name"] = {"enum": ["Oslo", "Bergen"]}
    tool["function"]["parameters"]["properties"]["people"] = {"type": "integer", "minimum": 1, "maximum": 9}
    found = client.chat.completions.create(
        model="parrot", messages=said("No."), tools=[tool], tool_choice=choice, max_tokens=200
    )
    [call] = found.choices[0].message.tool_calls
    assert call.function.name == "weather"
    assert City.model_validate_json(call.function.arguments).name in ("Oslo", "Bergen")


def test_tools_that_must_not_be_called(client):
    found = client.chat.completions.create(model="parrot", messages=said("No."), tools=[TOOL], tool_choice="none")
    assert found.choices[0].message.content == "No."
    assert found.choices[0].message.tool_calls is None


def test_parses_structured_output(client):
    messages = said(OSLO.model_dump_json())
    found = client.chat.completions.parse(model="parrot", messages=messages, response_format=City)
    assert found.choices[0].message.parsed == OSLO
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    schema |= {"additionalProperties": False}
    given = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    forced = client.chat.completions.create(model="parrot", messages=said("Maybe."), response_format=given)
    assert isinstance(json.loads(forced.choices[0].message.content)["ok"], bool)
    any_object = client.chat.completions.create(
        model="parrot", messages=said('{"a": [1, 2]}'), response_format={"type": "json_object"}
    )
    assert json.loads(any_object.choices[0].message.content) == {"a": [1, 2]}


@pytest.mark.parametrize("generation", [{}, {"add_generation_prompt": False}])
def test_the_last_message_is_continued(client, generation):
    """With vLLM's fields. The answer has the new text only."""
    create, begun = client.chat.completions.create, [*said("Hello, tide!"), {"role": "assistant", "content": "Hello"}]
    extra = {"continue_final_message": True, **generation}
    found = create(model="parrot", messages=begun, extra_body=extra)
    assert (found.choices[0].message.content, found.choices[0].finish_reason) == (", tide!", "stop")
    chunks = list(create(model="parrot", messages=begun, extra_body=extra, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ", tide!"
    anew = create(model="parrot", messages=begun, extra_body={"continue_final_message": False})
    assert anew.choices[0].message.content == "Hello, tide!"


ASSISTANT = {"role": "assistant", "content": "Hello"}
CALLED = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("last", "extra", "param"),
    [
        (ASSISTANT, {"continue_final_message": True, "add_generation_prompt": True}, "add_generation_prompt"),
        (ASSISTANT, {"continue_final_message": False, "add_generation_prompt": False}, "add_generation_prompt"),
        (ASSISTANT, {"add_generation_prompt": False}, "add_generation_prompt"),
        ({"role": "user", "content": "Hello"}, {"continue_final_message": True}, "continue_final_message"),
        ({**ASSISTANT, "tool_calls": [CALLED]}, {"continue_final_message": True}, "continue_final_message"),
        ({"role": "assistant"}, {"continue_final_message": True}, "continue_final_message"),
    ],
)
def test_what_cannot_be_continued(client, last, extra, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="parrot", messages=[*said("a"), last], extra_body=extra)
    assert caught.value.param == param


@pytest.mark.parametrize("text", [OSLO.model_dump_json(), CALL, f"{CALL}\n{CALL}", "Hi", f"Look:\n{CALL}"])
def test_calls_or_an_answer_of_a_schema(client, text):
    """The grammar allows nothing else, whatever text the model prefers. The client parses the answer."""
    tool = openai.pydantic_function_tool(pydantic.create_model("weather", city=str))
    fields = {"model": "parrot", "messages": said(text), "tools": [tool], "response_format": City, "max_tokens": 500}
    fields |= {"logit_bias": {str(ord('"') - 33): 20}} if text == "Hi" else {}  # otherwise the string would never end
    found = client.chat.completions.parse(**fields).choices[0]
    with client.chat.completions.stream(**fields) as stream:
        streamed = stream.get_final_completion().choices[0]
    for choice in (found, streamed):
        if text.startswith("<"):
            calls = choice.message.tool_calls
            assert [call.function.parsed_arguments.city for call in calls] == ["Oslo"] * text.count("Oslo")
            assert (choice.finish_reason, choice.message.content or None) == ("tool_calls", None)
        else:
            assert isinstance(choice.message.parsed, City)
            assert text[0] != "{" or choice.message.parsed == OSLO
            assert (choice.finish_reason, choice.message.tool_calls or None) == ("stop", None)


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # from the client, about its own parsed objects
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("text", [OSLO.model_dump_json(), f"{CALL}\n{CALL}"])
def test_an_answer_goes_back_as_a_message(client, text, stream):
    """The client adds fields to it: parsed objects, and the index of each call in a stream."""
    tool = openai.pydantic_function_tool(pydantic.create_model("weather", city=str))
    fields = {"model": "parrot", "tools": [tool], "response_format": City}
    if stream:
        with client.chat.completions.stream(**fields, messages=said(text)) as events:
            message = events.get_final_completion().choices[0].message
    else:
        message = client.chat.completions.parse(**fields, messages=said(text)).choices[0].message
    results = [{"role": "tool", "tool_call_id": call.id, "content": "[[Rain.]]"} for call in message.tool_calls or []]
    messages = [*said(text), message, *(results or said("Rain."))]
    answer = client.chat.completions.create(model="parrot", tools=[tool], messages=messages)
    assert answer.choices[0].message.content == "Rain."


@pytest.mark.parametrize("more", [{"reasoning_content": None, "parsed": {"a": 1}}, {"tool_calls": None, "x": None}])
def test_null_in_a_message_means_absent(client, model, more):
    """Answers of other servers have null fields, and clients send them back."""
    messages = [*said("one"), {"role": "assistant", "content": "one"}, *said("two")]
    found = client.chat.completions.create(model="parrot", messages=[messages[0], {**messages[1], **more}, messages[2]])
    assert found.choices[0].message.content == "two"
    assert found.usage.prompt_tokens == len(model.tokenizer.encode_chat(messages))


def test_guided(client):
    create = client.chat.completions.create
    regex = create(model="parrot", messages=said("x"), extra_body={"guided_regex": "[ab]{3}c"})
    assert re.fullmatch("[ab]{3}c", regex.choices[0].message.content)
    choice = create(model="parrot", messages=said("x"), extra_body={"guided_choice": ["yes", "no"]})
    assert choice.choices[0].message.content in ("yes", "no")


def test_completions(client, model):
    found = client.completions.create(model="parrot", prompt=["a [[one]]", "b [[two]]"], max_tokens=8)
    assert [choice.text for choice in found.choices] == ["one", "two"]
    ids = model.tokenizer.encode("a [[one]]")
    echoed = client.completions.create(model="parrot", prompt=ids, max_tokens=3, echo=True, logprobs=1)
    assert echoed.choices[0].text == "a [[one]]one"
    expected = model.score([*ids, *model.tokenizer.encode("one")]).logprobs
    assert echoed.choices[0].logprobs.token_logprobs[0] is None
    assert echoed.choices[0].logprobs.token_logprobs[1:] == pytest.approx(expected, abs=1e-5)
    text = "".join(chunk.choices[0].text for chunk in client.completions.create(
        model="parrot", prompt="a [[streamed]]", max_tokens=20, stream=True
    ))  # fmt: skip
    assert text == "streamed"


def test_models(client):
    assert [model.id for model in client.models.list()] == ["parrot"]
    assert client.models.retrieve("parrot").object == "model"


def test_errors(client, url):
    create = client.chat.completions.create
    with pytest.raises(openai.BadRequestError) as wrong:
        create(model="parrot", messages=said("x"), temperature=1000)
    assert (wrong.value.param, wrong.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.NotFoundError) as absent:
        create(model="other", messages=said("x"))
    assert absent.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError, match="/v1/embeddings"):
        client.embeddings.create(model="parrot", input="x")
    with openai.OpenAI(base_url=url, api_key="wrong", max_retries=0) as other:
        with pytest.raises(openai.AuthenticationError) as refused:
            other.models.list()
        assert KEY not in str(refused.value)
