"""Anthropic's API through Anthropic's client: text, tools, streams, counts and errors."""

from __future__ import annotations

import asyncio
import json
import re

import anthropic
import httpx
import pytest
from anthropic import Anthropic, AsyncAnthropic
from pydantic import TypeAdapter
from support.engines import check_pages
from support.parrot import parrot
from support.scripted import model_with_tools, saying
from support.servers import serving

from qwenkern.server.settings import Settings

QUESTION = [{"role": "user", "content": "When is high tide in Emden?"}]
PLACE = {"type": "object", "properties": {"place": {"enum": ["Emden", "Kiel"]}}, "required": ["place"]}
PLACE |= {"additionalProperties": False}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
TOOLS = [
    {"name": "tide", "description": "Of today.", "input_schema": PLACE},
    {"name": "clock", "input_schema": NOTHING},
]
BOTH = (
    'Let me look.\n<tool_call>\n{"name": "tide", "arguments": {"place": "Emden"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
)
CALLS = [("tide", {"place": "Emden"}), ("clock", {})]


@pytest.fixture(scope="module")
def model():
    with model_with_tools() as model:
        yield model
        check_pages(model)


@pytest.fixture
def client(url):
    with Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        yield client


def fields(**more) -> dict:
    return {"model": "toy", "messages": QUESTION, "max_tokens": 400, **more}


def calls_of(message) -> list[tuple[str, object]]:
    return [(block.name, block.input) for block in message.content if block.type == "tool_use"]


# Text


def test_an_answer_is_that_of_the_model(client, model):
    found = client.messages.create(**fields(max_tokens=12, extra_body={"temperature": 0}))
    expected = model.chat(QUESTION, max_tokens=12, temperature=0)
    assert [block.text for block in found.content] == [expected.text]
    assert (found.stop_reason, found.usage.output_tokens) == ("max_tokens", 12)
    assert found.usage.input_tokens + found.usage.cache_read_input_tokens == expected.num_prompt_tokens


def test_a_stream_is_the_same_message(client, model):
    expected = model.chat(QUESTION, max_tokens=12, temperature=0)
    with client.messages.stream(**fields(max_tokens=12, extra_body={"temperature": 0})) as stream:
        text = "".join(stream.text_stream)
        message = stream.get_final_message()
    assert text == message.content[0].text == expected.text
    assert (message.stop_reason, message.usage.output_tokens) == ("max_tokens", 12)
    assert message.usage.input_tokens + message.usage.cache_read_input_tokens == expected.num_prompt_tokens


def test_events_come_in_their_order(url, model):
    with saying(model, BOTH):
        answer = httpx.post(f"{url}/v1/messages", json=fields(tools=TOOLS, stream=True), timeout=60)
    events = [dict(line.split(": ", 1) for line in event.split("\n")) for event in answer.text.strip().split("\n\n")]
    kinds, known = [event["event"] for event in events], TypeAdapter(anthropic.types.RawMessageStreamEvent)
    assert kinds[:2] == ["message_start", "ping"]
    assert kinds[-2:] == ["message_delta", "message_stop"]
    for event in events:
        data = json.loads(event["data"])
        assert data["type"] == event["event"]
        if data["type"] != "ping":
            known.validate_python(data)
    short = "".join({"start": "<", "delta": ".", "stop": ">"}[kind.rsplit("_")[-1]] for kind in kinds[2:-2])
    assert re.fullmatch(r"<\.{3,}><\.{3,}><\.+>", short)  # a text, then calls in pieces
    starts = [json.loads(event["data"]) for event in events if event["event"] == "content_block_start"]
    assert [each["content_block"].get("name") for each in starts] == [None, "tide", "clock"]


def test_a_stream_begins_with_the_tokens_of_its_prompt(client, model):
    prompt = {"messages": [{"role": "user", "content": "A prompt of several pages. " * 10}]}
    first, again = (list(client.messages.create(**fields(**prompt, max_tokens=2, stream=True))) for _ in range(2))
    counted = client.messages.count_tokens(model="toy", **prompt).input_tokens
    for cached, events in ((False, first), (True, again)):
        begin, end = events[0].message.usage, events[-2].usage
        assert begin.input_tokens + begin.cache_read_input_tokens == counted
        assert bool(begin.cache_read_input_tokens) == cached
        assert (end.input_tokens, end.cache_read_input_tokens) == (begin.input_tokens, begin.cache_read_input_tokens)


@pytest.mark.parametrize("content", ["The tide is", [{"type": "text", "text": "The tide is"}], ""])
def test_the_last_message_is_continued(client, model, content):
    """The answer has the new text only."""
    messages = [*QUESTION, {"role": "assistant", "content": content}]
    with saying(model, " high.", " high.") as read:
        message = client.messages.create(**fields(messages=messages))
        with client.messages.stream(**fields(messages=messages)) as stream:
            streamed = stream.get_final_message()
    assert message.content[0].text == streamed.content[0].text == " high."
    begun = "<|im_start|>assistant|The tide is" if content else "<|im_start|>assistant|"
    assert read == [f"<|im_start|>user|When is high tide in Emden?<|im_end|>{begun}"] * 2
    counted = client.messages.count_tokens(model="toy", messages=messages).input_tokens
    assert counted == streamed.usage.input_tokens + streamed.usage.cache_read_input_tokens
    assert counted == len(model.tokenizer.encode(read[0]))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("said", "more", "text", "reason", "stop"),
    [
        ("One. Two.", {}, "One. Two.", "end_turn", None),
        ("One. Two.", {"stop_sequences": ["Tw", "x"]}, "One. ", "stop_sequence", "Tw"),
        ("One. Two.", {"max_tokens": 3}, "One", "max_tokens", None),
        ("<tool_call>no</tool_call>", {"tools": TOOLS}, "<tool_call>no</tool_call>", "end_turn", None),
    ],
)
def test_why_a_message_ends(client, model, said, more, text, reason, stop, stream):
    with saying(model, said):
        if stream:
            with client.messages.stream(**fields(**more)) as events:
                message = events.get_final_message()
        else:
            message = client.messages.create(**fields(**more))
    assert "".join(block.text for block in message.content) == text
    assert (message.stop_reason, message.stop_sequence) == (reason, stop)


# Tools


def test_calls_are_blocks(client, model):
    with saying(model, BOTH, BOTH):
        message = client.messages.create(**fields(tools=TOOLS))
        with client.messages.stream(**fields(tools=TOOLS)) as stream:
            streamed = stream.get_final_message()
    for each in (message, streamed):
        assert [block.type for block in each.content] == ["text", "tool_use", "tool_use"]
        assert (each.content[0].text, each.stop_reason) == ("Let me look.", "tool_use")
        assert calls_of(each) == CALLS
        assert all(block.id.startswith("toolu_") for block in each.content[1:])


BROKEN = '{"name": "tide", "arguments": {"place": "Emden", high}}'


@pytest.mark.parametrize(
    ("said", "more", "reason"),
    [(f"<tool_call>{BROKEN}</tool_call>", {}, "end_turn"), (BOTH, {"max_tokens": 80}, "max_tokens")],
)
def test_a_call_that_breaks_off_becomes_text(client, model, said, more, reason):
    """A stream has begun the call, which the client's accumulator accepts. Its text follows, as in a whole answer."""
    with saying(model, said, said):
        expected = client.messages.create(**fields(tools=TOOLS, **more))
        with client.messages.stream(**fields(tools=TOOLS, **more)) as stream:
            message = stream.get_final_message()
    assert calls_of(expected) == []
    ((name, arguments),) = calls_of(message)
    assert (name, set(arguments)) == ("tide", {"place"})
    texts = ["".join(block.text for block in each.content if block.type == "text") for each in (expected, message)]
    assert texts[0] == texts[1] == said[: more.get("max_tokens")]
    assert expected.stop_reason == message.stop_reason == reason


def test_several_turns(url, model):
    """The client sends back what it got. The results follow in the order of the calls."""

    async def talk():
        conversation: list = [{"role": "user", "content": [{"type": "text", "text": "Emden?"}]}]
        async with AsyncAnthropic(base_url=url, api_key="none", max_retries=0) as client:
            more = {
                "model": "toy",
                "max_tokens": 400,
                "tools": TOOLS,
                "system": [{"type": "text", "text": "Be brief."}],
            }
            async with client.messages.stream(messages=conversation, **more) as stream:
                message = await stream.get_final_message()
            results: list = []
            for block in reversed(message.content[1:]):
                told = {"tide": "15:00", "clock": [{"type": "text", "text": "stopped"}]}[block.name]
                result = {"type": "tool_result", "tool_use_id": block.id, "content": told}
                results.append({**result, "is_error": block.name == "clock"})
            cached = {"type": "text", "text": "Well?", "cache_control": {"type": "ephemeral"}}
            conversation += [
                {"role": "assistant", "content": message.content},
                {"role": "user", "content": [*results, cached]},
            ]
            return await client.messages.create(messages=conversation, **more)

    with saying(model, BOTH, "At three.") as read:
        message = asyncio.run(talk())
    assert (message.content[0].text, message.stop_reason) == ("At three.", "end_turn")
    tools, _, conversation = read[1].partition("<|im_start|>")
    assert '{"name": "tide", "description": "Of today.", "parameters": {"type": "object",' in tools
    assert conversation == (
        "system|Be brief.<|im_end|><|im_start|>user|Emden?<|im_end|>"
        '<|im_start|>assistant|Let me look.(tide {"place": "Emden"})(clock {})<|im_end|>'
        "<|im_start|>tool|15:00<|im_end|><|im_start|>tool|Error: stopped<|im_end|>"
        "<|im_start|>user|Well?<|im_end|><|im_start|>assistant|"
    )


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("choice", "names"), [({"type": "any"}, ["tide", "clock"]), ({"type": "tool", "name": "tide"}, ["tide"])]
)
def test_forced_calls_are_right(client, choice, names, stream):
    """The model has random weights: only the grammar makes its text a call."""
    more = fields(tools=TOOLS, tool_choice={**choice, "disable_parallel_tool_use": True})
    if stream:
        with client.messages.stream(**more) as events:
            message = events.get_final_message()
    else:
        message = client.messages.create(**more)
    ((name, arguments),) = calls_of(message)
    assert name in names
    assert arguments in ([{}] if name == "clock" else [{"place": "Emden"}, {"place": "Kiel"}])
    assert message.stop_reason == "tool_use"


def test_no_tools_with_the_choice_none(client, model):
    with saying(model, BOTH) as read:
        message = client.messages.create(**fields(tools=TOOLS, tool_choice={"type": "none"}))
    assert [block.text for block in message.content] == [BOTH]
    assert "Of today." not in read[0]


def test_an_answer_of_a_schema(client):
    schema = {"type": "object", "properties": {"high": {"type": "boolean"}}, "required": ["high"]}
    schema |= {"additionalProperties": False}
    form = {"format": {"type": "json_schema", "schema": schema}}
    message = client.messages.create(**fields(output_config=form))
    assert json.loads(message.content[0].text) in [{"high": True}, {"high": False}]


@pytest.mark.parametrize("text", ['{"high": true}', BOTH.partition("\n")[2], "Hi"])
def test_calls_or_an_answer_of_a_schema(text):
    """The grammar allows nothing else, whatever text the model prefers."""
    schema = {"type": "object", "properties": {"high": {"type": "boolean"}}, "required": ["high"]}
    form = {"format": {"type": "json_schema", "schema": {**schema, "additionalProperties": False}}}
    with parrot() as model, serving(model) as url, Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        more = fields(messages=[{"role": "user", "content": f"[[{text}]]"}], tools=TOOLS, output_config=form)
        message = client.messages.create(**more)
        with client.messages.stream(**more) as stream:
            assert stream.get_final_message().content[0].type == message.content[0].type
        forced = client.messages.create(**{**more, "tool_choice": {"type": "tool", "name": "clock"}})
    if text.startswith("<"):
        assert (calls_of(message), message.stop_reason) == (CALLS, "tool_use")
        assert [block.type for block in message.content] == ["tool_use"] * 2
    else:
        assert json.loads(message.content[0].text)["high"] in (True, False)
        assert text == "Hi" or message.content[0].text == text
    assert calls_of(forced)[0] == ("clock", {})


def test_the_client_runs_tools():
    """The client first asks the server to store the conversation. After the refusal, it sends all of it."""

    @anthropic.beta_tool
    def tide(place: str) -> str:
        """Of today."""
        return f"[[At three in {place}.]]"

    call = '<tool_call>\n{"name": "tide", "arguments": {"place": "Emden"}}\n</tool_call>'
    messages = [{"role": "user", "content": f"[[{call}]]"}]
    with parrot() as model, serving(model) as url, Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        runner = client.beta.messages.tool_runner(model="toy", max_tokens=100, messages=messages, tools=[tide])
        assert runner.until_done().content[0].text == "At three in Emden."


def test_tokens_are_counted_as_the_answer_counts_them(client, model):
    prompt = {"model": "toy", "messages": QUESTION, "system": "Be brief.", "tools": TOOLS}
    counted = client.messages.count_tokens(**prompt).input_tokens
    usage = client.messages.create(**prompt, max_tokens=1).usage
    assert counted == usage.input_tokens + usage.cache_read_input_tokens
    assert counted > client.messages.count_tokens(model="toy", messages=QUESTION).input_tokens > 27


# Errors

CALLED = {"type": "tool_use", "id": "a", "name": "clock", "input": {}}
RESULT = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": "x"}]}
IMAGE = {"type": "image", "source": {"type": "url", "url": "http://127.0.0.1/"}}


@pytest.mark.parametrize("stream", [False, True])
def test_text_and_calls_keep_their_order(client, model, stream):
    said = BOTH.replace("</tool_call>\n<tool_call>", "</tool_call>\nAnd the time.\n<tool_call>") + "That is all."
    with saying(model, said):
        if stream:
            with client.messages.stream(**fields(tools=TOOLS)) as events:
                message = events.get_final_message()
        else:
            message = client.messages.create(**fields(tools=TOOLS))
    found = [block.text.strip() if block.type == "text" else block.name for block in message.content]
    assert found == ["Let me look.", "tide", "And the time.", "clock", "That is all."]


def test_max_tokens_may_be_more_than_the_context(client, model, url):
    """Clients send large numbers by default. The answer then ends where the context ends."""
    room = model.config.context_length - client.messages.count_tokens(model="toy", messages=QUESTION).input_tokens
    full = [*QUESTION, {"role": "assistant", "content": "a" * (room - 40)}]
    room = model.config.context_length - client.messages.count_tokens(model="toy", messages=full).input_tokens
    assert 0 < room < 50
    fit = fields(messages=full, extra_body={"temperature": 0})
    for max_tokens, reason in ((16_000, "model_context_window_exceeded"), (room, "max_tokens"), (3, "max_tokens")):
        message = client.messages.create(**fit | {"max_tokens": max_tokens})
        assert (message.stop_reason, message.usage.output_tokens) == (reason, min(room, max_tokens))
        with client.messages.stream(**fit | {"max_tokens": max_tokens}) as stream:
            assert stream.get_final_message().stop_reason == reason
    full[-1]["content"] += "b" * 50
    refused = httpx.post(f"{url}/v1/messages", json=fields(messages=full), timeout=60)
    assert refused.status_code == 400
    assert "context length" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [*QUESTION, {"role": "assistant", "content": "It "}]}, "ends with a blank"),
        ({"messages": [*QUESTION, {"role": "assistant", "content": [CALLED]}]}, "ends with a tool_use"),
        ({"messages": [RESULT]}, "tool_use_id of a result is 'a'"),
        ({"messages": [{"role": "user", "content": []}]}, "messages.0.content is an empty list"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages.0.content.0.type is 'image'; expected 'text'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text is missing"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use"}]}]}, "'tool_use'; expected 'text' or 'tool_"),
        ({"system": [{"type": "text", "text": 1}]}, "system.0.text"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"stop_sequences": ["x"] * 17}, "stop_sequences has 17"),
        ({"temperature": -1.0}, "temperature"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "does not think"),
        ({"mcp_servers": [{}]}, "mcp_servers"),
        ({"colour": 1}, "colour"),
        ({"tools": [{"type": "web_search_20250305", "name": "w"}]}, "tools.0"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tide twice"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "x"}}, "'x', which is not among tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tool_choice": {"type": "any"}}, "there are no tools"),
        (
            {"tools": TOOLS, "output_config": {"format": {"type": "json_schema", "schema": {"not": {}}}}},
            "output_config.format.schema is not supported",
        ),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"not": {}}}}}, "output_config.format.schema"),
        ({"output_config": {"effort": "low"}}, "output_config.effort"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_is_refused(url, more, message):
    answer = httpx.post(f"{url}/v1/messages", json=fields(**more), timeout=60)
    assert answer.status_code == 400
    body = answer.json()
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
    assert message in body["error"]["message"]


def test_errors_of_the_client(url, model):
    with Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        with pytest.raises(anthropic.NotFoundError) as caught:
            client.messages.create(**fields(model="other"))
        assert caught.value.body["error"]["type"] == "not_found_error"
    with serving(model, Settings(api_keys=("key",))) as guarded:
        with Anthropic(base_url=guarded, api_key="key", max_retries=0) as client:  # sent as x-api-key
            assert client.messages.create(**fields(max_tokens=1)).role == "assistant"
        with Anthropic(base_url=guarded, api_key="other", max_retries=0) as client:
            with pytest.raises(anthropic.AuthenticationError) as caught:
                client.messages.count_tokens(model="toy", messages=QUESTION)
            assert caught.value.body["error"]["type"] == "authentication_error"
