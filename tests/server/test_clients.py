"""Other projects' frameworks as clients of the server: they show what the model says."""

from __future__ import annotations

import asyncio
import json

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


# langchain-openai


@pytest.fixture(scope="module")
def chat(url):
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(model="parrot", base_url=url, api_key=KEY, max_retries=0)


@pytest.mark.slow
def test_langchain(chat):
    found = chat.invoke("Say [[Hello]]")
    assert found.content == "Hello"
    assert found.usage_metadata["output_tokens"] == 6
    assert "".join(chunk.content for chunk in chat.stream("Say [[Hello]]")) == "Hello"
    assert [answer.content for answer in chat.batch(["[[a]]", "[[b]]"])] == ["a", "b"]
    assert asyncio.run(chat.ainvoke([("system", "x"), ("human", "[[c]]")])).content == "c"


@pytest.mark.slow
def test_langchain_tools(chat):
    from langchain_core.messages import HumanMessage, ToolMessage

    def weather(city: str) -> str:
        """The weather of a city."""
        return f"[[Rain in {city}.]]"

    bound, messages = chat.bind_tools([weather]), [HumanMessage(f"[[{CALL}]]")]
    messages.append(bound.invoke(messages))
    [call] = messages[-1].tool_calls
    assert (call["name"], call["args"]) == ("weather", {"city": "Oslo"})
    messages.append(ToolMessage(weather(**call["args"]), tool_call_id=call["id"]))
    assert bound.invoke(messages).content == "Rain in Oslo."
    whole = None
    for chunk in bound.stream(messages[:1]):
        whole = chunk if whole is None else whole + chunk
    assert [call["args"] for call in whole.tool_calls] == [{"city": "Oslo"}]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
def test_langchain_structured_output(chat, method):
    wanted = OSLO.model_dump_json()
    if method == "function_calling":
        wanted = f'<tool_call>\n{{"name": "City", "arguments": {json.dumps(OSLO.model_dump())}}}\n</tool_call>'
    assert chat.with_structured_output(City, method=method).invoke(f"[[{wanted}]]") == OSLO


# litellm


@pytest.mark.slow
def test_litellm(url, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # no download
    import litellm

    server = {"model": "openai/parrot", "api_base": url, "api_key": KEY, "num_retries": 0}
    found = litellm.completion(messages=said("Hello"), temperature=0, max_tokens=20, **server)
    assert found.choices[0].message.content == "Hello"
    assert found.usage.completion_tokens == 6
    chunks = litellm.completion(messages=said("Hello"), stream=True, **server)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hello"
    called = litellm.completion(messages=said(CALL), tools=[TOOL], tool_choice="auto", **server)
    assert called.choices[0].message.tool_calls[0].function.name == "weather"
    answer = called.choices[0].message
    result = {"role": "tool", "tool_call_id": answer.tool_calls[0].id, "content": "[[Rain.]]"}
    told = litellm.completion(messages=[*said(CALL), answer, result], tools=[TOOL], **server)
    assert told.choices[0].message.content == "Rain."
    typed = litellm.completion(messages=said(OSLO.model_dump_json()), response_format=City, **server)
    assert City.model_validate_json(typed.choices[0].message.content) == OSLO
    later = asyncio.run(litellm.acompletion(messages=said("Later"), **server))
    assert later.choices[0].message.content == "Later"
    text = litellm.text_completion(
        prompt="[[abc]]", max_tokens=9, **server | {"model": "text-completion-openai/parrot"}
    )
    assert text.choices[0].text == "abc"
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        litellm.completion(messages=said("x"), temperature=1000, **server)


# pydantic-ai


@pytest.mark.slow
def test_pydantic_ai_agent_with_a_tool_and_a_typed_output(url):
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    agent = Agent(OpenAIChatModel("parrot", provider=OpenAIProvider(base_url=url, api_key=KEY)), output_type=City)
    seen = []

    @agent.tool_plain
    def weather(city: str) -> str:
        """The weather of a city."""
        seen.append(city)
        result = {"name": "final_result", "arguments": OSLO.model_dump()}
        return f"[[<tool_call>\n{json.dumps(result)}\n</tool_call>]]"

    assert agent.run_sync(f"[[{CALL}]]").output == OSLO
    assert seen == ["Oslo"]


@pytest.mark.slow
def test_pydantic_ai_streams(url):
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    agent = Agent(OpenAIChatModel("parrot", provider=OpenAIProvider(base_url=url, api_key=KEY)))

    async def run() -> list[str]:
        async with agent.run_stream("[[Hello, you]]") as result:
            return [text async for text in result.stream_text(delta=True, debounce_by=None)]

    assert "".join(asyncio.run(run())) == "Hello, you"
