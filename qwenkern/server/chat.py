"""POST /v1/chat/completions."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any, ClassVar, Literal

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..Model import Model
from . import answering, sse
from .answering import Answer
from .bodies import Body
from .endpoints import Endpoint
from .errors import ApiError
from .fields import Sampled
from .service import Service
from .settings import Bounds
from .tokens_as_text import chat_logprobs
from .turns import Finished, Text, Turn
from .usage import Usage


class Message(Body):
    """A message of the conversation."""

    REFUSED: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = {}

    role: Literal["developer", "system", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class ChatBody(Sampled):
    """The body of a request."""

    REFUSED: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = {}

    messages: list[Message]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    def turn(self, bounds: Bounds) -> Turn:
        """What the body asks for. Raises ApiError."""
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs", code="invalid_value")
        if (self.top_logprobs or 0) > bounds.top_logprobs:
            message = f"top_logprobs is {self.top_logprobs}; expected at most {bounds.top_logprobs}"
            raise ApiError(400, message, param="top_logprobs", code="invalid_value")
        params = self.sampling(
            bounds,
            max_tokens=self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )
        messages = [message.model_dump(exclude_none=True) for message in self.messages]
        return Turn([messages], params, is_streamed=bool(self.stream))


async def create(service: Service, request: Request, body: ChatBody) -> Response:
    """Answers a conversation."""
    turn = body.turn(service.settings.bounds)
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
    return {
        "index": answer.index,
        "message": {"role": "assistant", "content": answer.text, "refusal": None},
        "logprobs": chat_logprobs(answer.logprobs, model) if turn.params.logprobs is not None else None,
        "finish_reason": answer.finished.reason,
    }


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
    # A chunk is written as text around its delta: json.dumps of all of it takes several times as long.
    usage, tail = Usage(), ', "usage": null}' if body.include_usage else "}"

    def chunk(index: int, delta: str, finish_reason: str = "null", logprobs: str = "null") -> bytes:
        return (
            f'data: {head}, "choices": [{{"index": {index}, "delta": {delta}, "logprobs": {logprobs}, '
            f'"finish_reason": {finish_reason}}}]{tail}\n\n'
        ).encode()

    begun: set[int] = set()
    async with (
        service.models.use(body.model) as model,
        aclosing(answering.events(service, model, turn)) as events,
    ):
        async for event in events:
            if event.index not in begun:
                begun.add(event.index)
                yield chunk(event.index, '{"role": "assistant", "content": "", "refusal": null}')
            if isinstance(event, Text):
                logprobs = json.dumps(chat_logprobs(event.logprobs, model)) if event.logprobs else "null"
                if event.text or event.logprobs:
                    yield chunk(event.index, f'{{"content": {json.dumps(event.text)}}}', logprobs=logprobs)
            elif isinstance(event, Finished):
                usage.add(event, turn)
                yield chunk(event.index, "{}", json.dumps(event.reason))
    if body.include_usage:
        yield f'data: {head}, "choices": [], "usage": {json.dumps(usage.body())}}}\n\n'.encode()
    yield sse.DONE


ENDPOINTS = [Endpoint("/v1/chat/completions", "POST", create, ChatBody, "Answers a conversation", streams=True)]
