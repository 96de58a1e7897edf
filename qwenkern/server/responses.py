"""POST /v1/responses: OpenAI's newer API.

The events of a stream: created in_progress (output_item.added ... output_item.done)... completed (or incomplete)
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..Model import Model
from . import answering, sse
from .endpoints import Endpoint
from .errors import ApiError
from .response_bodies import ResponsesBody
from .service import Service
from .tokens_as_text import chat_logprobs
from .turns import CallArguments, CallBegun, CallBroken, CallEvent, Event, Finished, Started, Text, ToolCall, Turn


async def create(service: Service, request: Request, body: ResponsesBody) -> Response:
    """Answers a conversation."""
    turn = await service.in_pool(body.turn, service.settings.bounds)
    writing = _Writing(body, body.model or service.models.names[0])
    if body.stream:
        return await sse.stream(_events(service, turn, writing), writing.error)
    async with service.models.use(body.model) as model:
        (answer,) = await answering.answers(service, model, turn)
        events: list[Event] = []
        for part in answer.parts:
            if isinstance(part, str):  # the first text gets the log-probabilities of all tokens
                events.append(Text(0, part, logprobs=[] if events else answer.logprobs))
            else:
                events += [CallBegun(0, part.id, part.name), CallArguments(0, part.arguments), part]
        for event in [*events, answer.finished]:
            for _ in writing.events(event, model):
                pass
    return JSONResponse(writing.response())


async def _events(service: Service, turn: Turn, writing: _Writing) -> AsyncGenerator[bytes, None]:
    async with (
        service.models.use(writing.body.model) as model,
        aclosing(answering.events(service, model, turn)) as events,
    ):
        async for event in events:
            begun = writing.begin() if isinstance(event, Started) else b""  # not earlier: the prompt may be refused
            if found := begun + b"".join(writing.events(event, model)):
                yield found


class _Writing:
    """Builds a response from the events of an answer, and writes OpenAI's events."""

    def __init__(self, body: ResponsesBody, model_name: str) -> None:
        self.body = body
        self._model_name = model_name
        self._id, self._created = f"resp_{uuid.uuid4().hex}", int(time.time())
        self._number = -1  # of the last event
        self._output: list[dict[str, Any]] = []
        self._part: dict[str, Any] | None = None  # the text part of the unfinished message
        self._pending: list[dict[str, Any]] = []  # log-probabilities of tokens without text so far
        self._finished: Finished | None = None

    def begin(self) -> bytes:
        return b"".join(
            self._event(f"response.{kind}", response=self.response()) for kind in ("created", "in_progress")
        )

    def events(self, event: Event, model: Model) -> Iterator[bytes]:
        """Yields OpenAI's server-sent events for one event of an answer."""
        if isinstance(event, Started):
            return
        if isinstance(event, Text):
            logprobs = self._pending + chat_logprobs(event.logprobs, model)["content"]
            if not event.text and self._part is None:
                self._pending = logprobs
                return
            self._pending = []
            if self._part is None:
                yield from self._begin_message()
            if self._part is not None and (event.text or logprobs):
                self._part["text"] += event.text
                self._part["logprobs"] += logprobs
                place = {**self._place(), "content_index": 0}
                yield self._event("response.output_text.delta", **place, delta=event.text, logprobs=logprobs)
            return
        is_cut = isinstance(event, Finished) and event.reason == "length"
        if isinstance(event, Finished) and not self._output:
            yield from self._begin_message()
            self._part = {**self._part, "logprobs": self._pending} if self._part else None
        self._pending = []  # drops those of the tokens of a call
        if self._part is not None:
            yield from self._end_message("incomplete" if is_cut else "completed")
        if isinstance(event, Finished):
            self._finished = event
            yield self._event(f"response.{self._status()}", response=self.response())
        else:
            yield from self._call(event)

    def _begin_message(self) -> Iterator[bytes]:
        item = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant"}
        self._output.append({**item, "status": "in_progress", "content": []})
        yield self._event("response.output_item.added", output_index=len(self._output) - 1, item=self._output[-1])
        self._part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        yield self._event("response.content_part.added", **self._place(), content_index=0, part=self._part)

    def _end_message(self, status: str) -> Iterator[bytes]:
        part, self._part = self._part, None
        assert part is not None
        place = {**self._place(), "content_index": 0}
        yield self._event("response.output_text.done", **place, text=part["text"], logprobs=part["logprobs"])
        yield self._event("response.content_part.done", **place, part=part)
        self._output[-1] |= {"status": status, "content": [part]}
        yield self._event("response.output_item.done", output_index=len(self._output) - 1, item=self._output[-1])

    def _call(self, event: CallEvent) -> Iterator[bytes]:
        if isinstance(event, CallArguments):
            self._output[-1]["arguments"] += event.text
            yield self._event("response.function_call_arguments.delta", **self._place(), delta=event.text)
            return
        if isinstance(event, CallBegun):
            item = {"id": f"fc_{uuid.uuid4().hex}", "type": "function_call", "call_id": event.id, "name": event.name}
            self._output.append({**item, "status": "in_progress", "arguments": ""})
            yield self._event("response.output_item.added", output_index=len(self._output) - 1, item=self._output[-1])
            return
        if isinstance(event, ToolCall):
            done = {**self._place(), "name": event.name, "arguments": event.arguments}
            yield self._event("response.function_call_arguments.done", **done)
        self._output[-1]["status"] = "incomplete" if isinstance(event, CallBroken) else "completed"
        yield self._event("response.output_item.done", output_index=len(self._output) - 1, item=self._output[-1])

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1}

    def _event(self, type: str, **fields: Any) -> bytes:
        self._number += 1
        data = json.dumps({"type": type, "sequence_number": self._number, **fields})
        return f"event: {type}\ndata: {data}\n\n".encode()

    def error(self, error: ApiError) -> bytes:
        """The event of an error after the stream has begun."""
        return self._event("error", code=error.code, message=error.message, param=error.param)

    def _status(self) -> str:
        if self._finished is None:
            return "in_progress"
        return "incomplete" if self._finished.reason == "length" else "completed"

    def response(self) -> dict[str, Any]:
        """The current state of the response."""
        body, finished, status = self.body, self._finished, self._status()
        told = body.model_dump(exclude_none=True, by_alias=True)
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self._model_name,
            "output": self._output,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": body.temperature,
            "text": {"format": {"type": "text"}, **told.get("text", {})},
            "tool_choice": "auto" if body.tool_choice is None else body.tool_choice,
            "tools": told.get("tools", []),
            "top_logprobs": body.top_logprobs or 0,
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": _usage(finished) if finished else None,
            "user": body.user,
        }


def _usage(finished: Finished) -> dict[str, Any]:
    return {
        "input_tokens": finished.num_prompt_tokens,
        "input_tokens_details": {"cached_tokens": finished.num_cached_tokens, "cache_write_tokens": 0},
        "output_tokens": finished.num_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": finished.num_prompt_tokens + finished.num_tokens,
    }


ENDPOINTS = [Endpoint("/v1/responses", "POST", create, ResponsesBody, "Answers a conversation", streams=True)]
