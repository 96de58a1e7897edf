"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API.

The events of a stream:
message_start ping (content_block_start content_block_delta... content_block_stop)... message_delta message_stop
"""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from . import answering, sse
from .admission import check_length
from .endpoints import Endpoint
from .errors import KINDS, ApiError
from .message_bodies import MessagesBody, PromptBody
from .service import Service
from .turns import CallArguments, CallBegun, Finished, Started, Text, ToolCall, Turn


def as_error(error: ApiError) -> dict[str, Any]:
    """The body of an error in the format of Anthropic's API."""
    kind = KINDS.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    told: dict[str, Any] = {"type": kind, "message": error.message}
    if error.param == "thread" and error.code == "unsupported_parameter":  # clients then send the whole conversation
        told["details"] = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
    return {"type": "error", "error": told}


async def create(service: Service, request: Request, body: MessagesBody) -> Response:
    """Answers a conversation."""
    turn = await service.in_pool(body.turn, service.settings.bounds)
    message_id = f"msg_{uuid.uuid4().hex}"
    if body.stream:
        events = _events(service, body, turn, message_id)
        return await sse.stream(events, lambda error: _event(**as_error(error)), quiet=_event("ping"))
    async with service.models.use(body.model) as model:
        (answer,) = await answering.answers(service, model, turn)
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {**_tool_use(part), "input": json.loads(part.arguments)}
        for part in answer.parts
    ]
    message = {**_message(message_id, body), "content": content, **_end(answer.finished, body)}
    return JSONResponse({**message, "usage": _usage(answer.finished)})


async def count_tokens(service: Service, request: Request, body: PromptBody) -> Response:
    """Counts the tokens of a prompt, without an answer."""
    bounds = service.settings.bounds
    async with service.models.use(body.model) as model:

        def encoded() -> list[int]:
            messages, tools = body.conversation(bounds), body.functions(bounds).tools or None
            check_length(model, messages, tools)
            return model._prompts.encode(messages, tools, body.continues)

        ids = await service.aside(encoded)
    return JSONResponse({"input_tokens": len(ids)})


def _message(message_id: str, body: MessagesBody) -> dict[str, Any]:
    message = {"id": message_id, "type": "message", "role": "assistant", "model": body.model}
    return {**message, "content": [], "stop_reason": None, "stop_sequence": None}


def _end(finished: Finished, body: MessagesBody) -> dict[str, Any]:
    if finished.reason == "stop" and isinstance(finished.stop_reason, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": finished.stop_reason}
    if finished.reason == "length" and finished.num_tokens < body.max_tokens:
        return {"stop_reason": "model_context_window_exceeded", "stop_sequence": None}
    reasons = {"length": "max_tokens", "tool_calls": "tool_use"}
    return {"stop_reason": reasons.get(finished.reason, "end_turn"), "stop_sequence": None}


def _usage(event: Started | Finished) -> dict[str, Any]:
    """Counts of tokens in Anthropic's format. input_tokens excludes the tokens that the cache had."""
    return {
        "input_tokens": event.num_prompt_tokens - event.num_cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": event.num_cached_tokens,
        "output_tokens": event.num_tokens if isinstance(event, Finished) else 1,
    }


def _tool_use(call: CallBegun | ToolCall) -> dict[str, Any]:
    return {"type": "tool_use", "id": call.id.replace("call_", "toolu_", 1), "name": call.name, "input": {}}


def _event(type: str, **fields: Any) -> bytes:
    return f"event: {type}\ndata: {json.dumps({'type': type, **fields})}\n\n".encode()


async def _events(service: Service, body: MessagesBody, turn: Turn, message_id: str) -> AsyncGenerator[bytes, None]:
    index, is_open = -1, False  # of the last content block, and whether it is an unfinished one of text
    async with (
        service.models.use(body.model) as model,
        aclosing(answering.events(service, model, turn)) as events,
    ):
        async for event in events:
            found = b""
            if is_open and not isinstance(event, Text):
                is_open = False
                found += _event("content_block_stop", index=index)
            if isinstance(event, Started):
                found += _event("message_start", message={**_message(message_id, body), "usage": _usage(event)})
                found += _event("ping")
            elif isinstance(event, Text):
                if event.text and not is_open:
                    is_open, index = True, index + 1
                    found += _event("content_block_start", index=index, content_block={"type": "text", "text": ""})
                if event.text:
                    delta = {"type": "text_delta", "text": event.text}
                    found += _event("content_block_delta", index=index, delta=delta)
            elif isinstance(event, CallBegun):
                index += 1
                found += _event("content_block_start", index=index, content_block=_tool_use(event))
            elif isinstance(event, CallArguments):
                delta = {"type": "input_json_delta", "partial_json": event.text}
                found += _event("content_block_delta", index=index, delta=delta)
            elif not isinstance(event, Finished):
                found += _event("content_block_stop", index=index)
            else:
                found += _event("message_delta", delta=_end(event, body), usage=_usage(event))
                found += _event("message_stop")
            if found:
                yield found


ENDPOINTS = [
    Endpoint("/v1/messages", "POST", create, MessagesBody, "Answers a conversation", as_error=as_error, streams=True),
    Endpoint("/v1/messages/count_tokens", "POST", count_tokens, PromptBody, "Counts tokens", as_error=as_error),
]
