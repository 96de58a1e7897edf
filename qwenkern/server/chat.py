"""POST /v1/chat/completions."""

from __future__ import annotations

import json
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, ClassVar, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..Model import Model
from . import answering, blocks, sse
from .answering import Answer
from .bodies import Body, Refused, Some
from .endpoints import Endpoint
from .errors import ApiError
from .fields import Sampled
from .functions import CallMade, Function, Functions, choice_of, in_order_of_calls
from .service import Service
from .settings import Bounds
from .tokens_as_text import chat_logprobs
from .turns import CallArguments, CallBegun, Finished, Started, Text, ToolCall, Turn
from .usage import Usage


class Message(Body):
    """A message of the conversation."""

    role: Literal["developer", "system", "user", "assistant", "tool"]
    content: str | Some[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: Some[CallMade] | None = None
    tool_call_id: str | None = None
    # clients send back these fields of OpenAI's answers
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = Field(None, max_length=0, exclude=True)
    parsed: Any = Field(None, exclude=True)  # OpenAI's client adds the content, parsed
    provider_specific_fields: Any = Field(None, exclude=True)  # litellm adds fields of an answer that it does not know


class TextPart(Body):
    """A part of a message. Prompts are cached without being asked, so `cache_control` changes nothing."""

    type: Literal["text", "input_text", "output_text"]
    text: str
    cache_control: dict[str, Any] | None = None


_PARTS: dict[str, type[Body]] = {"text": TextPart, "input_text": TextPart, "output_text": TextPart}


def conversation(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as chat templates read them. Raises ApiError."""
    for n, message in enumerate(messages):
        for field, role in (("tool_calls", "assistant"), ("tool_call_id", "tool")):
            if getattr(message, field) and message.role != role:
                place = f"messages.{n}.{field}"
                raise blocks.wrong(f"{place} is in a message of the {message.role}; expected one of the {role}", place)
        for k, part in enumerate(message.content if isinstance(message.content, list) else []):
            blocks.read(_PARTS, part, f"messages.{n}.content.{k}")
    return in_order_of_calls([message.model_dump(exclude_none=True) for message in messages])


class Tool(Body):
    """A function that the model may call."""

    type: Literal["function"]
    function: Function


class ChatBody(Sampled):
    """The body of a request."""

    REFUSED: ClassVar[Refused] = {
        "audio": ((), "the model writes text only"),
        "function_call": (("auto", "none"), "expected tool_choice"),
        "functions": (([],), "expected tools"),
        "metadata": (({},), "nothing is stored"),
        "modalities": ((["text"],), "the model writes text only"),
        "moderation": ((), "nothing is moderated"),
        "prediction": ((), "drafts come from the text itself"),
        "prompt_cache_options": ((), "the cache keeps what it has room for"),
        "prompt_cache_retention": (("in_memory",), "the cache keeps what it has room for"),
        "reasoning_effort": (("none",), "the model does not reason before it answers"),
        "service_tier": (("auto", "default"), "there is one tier; priority= orders requests"),
        "store": ((False,), "nothing is stored"),
        "verbosity": (("medium",), "expected a message that says how long the answer should be"),
        "web_search_options": ((), "the server does not search the web"),
    }

    messages: Some[Message] = Field(min_length=1)
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    prompt_cache_key: str | None = None  # changes nothing: all requests share one cache
    safety_identifier: str | None = None  # for the log
    tools: Some[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    # not OpenAI's
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None  # False only with continue_final_message

    def names(self) -> dict[str, str]:
        names = super().names() | {"logprobs": "top_logprobs"}
        return names | ({"max_tokens": "max_completion_tokens"} if self.max_completion_tokens is not None else {})

    def turn(self, bounds: Bounds) -> Turn:
        """What the body asks for. Raises ApiError."""
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs", code="invalid_value")
        if (self.top_logprobs or 0) > bounds.top_logprobs:
            message = f"top_logprobs is {self.top_logprobs}; expected at most {bounds.top_logprobs}"
            raise ApiError(400, message, param="top_logprobs", code="invalid_value")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            message = f"max_tokens is {self.max_tokens}, and max_completion_tokens {self.max_completion_tokens}"
            raise ApiError(400, f"{message}; expected one of them", param="max_completion_tokens", code="invalid_value")
        if len(self.messages) > bounds.messages:
            message = f"messages has {len(self.messages)} items; expected at most {bounds.messages}"
            raise ApiError(400, message, param="messages", code="invalid_value")
        self._check_end()
        choice = choice_of(self.tool_choice, ("function", "name"))
        functions = Functions.of([tool.function for tool in self.tools or []], choice, self.parallel_tool_calls, bounds)
        params = self.sampling(
            bounds,
            functions,
            max_tokens=self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )
        return Turn(
            [conversation(self.messages)],
            params,
            tools=functions.tools,
            continues=bool(self.continue_final_message),
            is_streamed=bool(self.stream),
        )

    def _check_end(self) -> None:
        """Raises ApiError unless the answer begins after the last message, or continues it."""
        begins, last = self.add_generation_prompt, self.messages[-1]
        if begins is not None and begins == bool(self.continue_final_message):
            message = "one of add_generation_prompt and continue_final_message is true, and not both"
            raise ApiError(400, message, param="add_generation_prompt", code="invalid_value")
        if self.continue_final_message and (last.role != "assistant" or last.tool_calls or last.content is None):
            message = "continue_final_message needs a last message of the assistant with content and without tool_calls"
            raise ApiError(400, message, param="continue_final_message", code="invalid_value")


async def create(service: Service, request: Request, body: ChatBody) -> Response:
    """Answers a conversation."""
    turn = await service.in_pool(body.turn, service.settings.bounds)
    completion_id, created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
    if body.stream:
        return await sse.stream(_chunks(service, body, turn, completion_id, created), sse.openai_error)
    async with service.models.use(body.model) as model:
        answers = await answering.answers(service, model, turn)
        choices = [_choice(answer, model, turn) for answer in answers]
    return JSONResponse(
        {
            "id": completion_id,
            "object": "chat.completion",
            "created": created,
            "model": body.model or service.models.names[0],
            "choices": choices,
            "usage": Usage.of(answers, turn).body(),
        }
    )


def _choice(answer: Answer, model: Model, turn: Turn) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
    if answer.tool_calls:
        message["content"] = answer.text or None
        message["tool_calls"] = [_call(call) for call in answer.tool_calls]
    return {
        "index": answer.index,
        "message": message,
        "logprobs": chat_logprobs(answer.logprobs, model) if turn.params.logprobs is not None else None,
        "finish_reason": answer.finished.reason,
    }


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


async def _chunks(
    service: Service, body: ChatBody, turn: Turn, completion_id: str, created: int
) -> AsyncGenerator[bytes, None]:
    head = json.dumps(
        {
            "id": completion_id,
            "object": "chat.completion.chunk",
            "created": created,
            "model": body.model or service.models.names[0],
        }
    )[:-1]
    # Only the delta is dumped, and the text around it is written as it is: dumping the whole chunk takes several times
    # as long.
    usage, tail = Usage(), ', "usage": null}' if body.include_usage else "}"

    def chunk(index: int, delta: str, finish_reason: str = "null", logprobs: str = "null") -> bytes:
        return (
            f'data: {head}, "choices": [{{"index": {index}, "delta": {delta}, "logprobs": {logprobs}, '
            f'"finish_reason": {finish_reason}}}]{tail}\n\n'
        ).encode()

    calls: Counter[int] = Counter()  # index of an answer -> its number of calls so far
    async with (
        service.models.use(body.model) as model,
        aclosing(answering.events(service, model, turn)) as events,
    ):
        async for event in events:
            if isinstance(event, Text):
                logprobs = json.dumps(chat_logprobs(event.logprobs, model)) if event.logprobs else "null"
                if event.text or event.logprobs:
                    yield chunk(event.index, f'{{"content": {json.dumps(event.text)}}}', logprobs=logprobs)
            elif isinstance(event, CallArguments):
                call = f'{{"index": {calls[event.index] - 1}, "function": {{"arguments": {json.dumps(event.text)}}}}}'
                yield chunk(event.index, f'{{"tool_calls": [{call}]}}')
            elif isinstance(event, CallBegun):
                begun_call = _call(ToolCall(event.index, event.id, event.name, ""))
                delta = {"tool_calls": [{"index": calls[event.index], **begun_call}]}
                calls[event.index] += 1
                yield chunk(event.index, json.dumps(delta))
            elif isinstance(event, Started):
                yield chunk(event.index, '{"role": "assistant", "content": "", "refusal": null}')
            elif isinstance(event, Finished):
                usage.add(event, turn)
                yield chunk(event.index, "{}", json.dumps(event.reason))
    if body.include_usage:
        yield f'data: {head}, "choices": [], "usage": {json.dumps(usage.body())}}}\n\n'.encode()
    yield sse.DONE


ENDPOINTS = [Endpoint("/v1/chat/completions", "POST", create, ChatBody, "Answers a conversation", streams=True)]
