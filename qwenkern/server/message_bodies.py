"""The request bodies of Anthropic's API, and how they become turns.

The server caches all prompts, so `cache_control` changes nothing.
"""

from __future__ import annotations

import json
from typing import Any, ClassVar, Literal

from pydantic import Field

from ..errors import RequestError
from ..sampling import SamplingParams
from . import blocks, errors
from .blocks import wrong
from .bodies import Body, Refused, Some
from .functions import Function, Functions, Name, in_order_of_calls
from .settings import Bounds
from .turns import Turn


class CacheControl(Body):
    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class Block(Body):
    cache_control: CacheControl | None = None


class TextBlock(Block):
    type: Literal["text"]
    text: str
    citations: None = None


class ToolUse(Block):
    """A call in a message of the assistant."""

    type: Literal["tool_use"]
    id: str
    name: str = Field(min_length=1)
    input: dict[str, Any]


class ToolResult(Block):
    """The result of a call, in a message of the user."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | Some[dict[str, Any]] | None = None
    is_error: bool | None = None


_TEXT: dict[str, type[Body]] = {"text": TextBlock}
_BLOCKS: dict[str, dict[str, type[Body]]] = {
    "user": {**_TEXT, "tool_result": ToolResult},
    "assistant": {**_TEXT, "tool_use": ToolUse},
    "system": _TEXT,
}


class Message(Body):
    role: Literal["user", "assistant", "system"]
    content: str | Some[dict[str, Any]]


class Tool(Block):
    """A function that the model may call."""

    type: Literal["custom"] | None = None
    name: Name
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None


class Choice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    def as_turn_has_it(self) -> str:
        if (self.type == "tool") != (self.name is not None):
            raise wrong("tool_choice.name goes with the type 'tool', and only with that", "tool_choice.name")
        return f"function:{self.name}" if self.type == "tool" else {"any": "required"}.get(self.type, self.type)


class JsonFormat(Body):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    format: JsonFormat | None = None


class Metadata(Body):
    user_id: str | None = None  # for the log


_NOT_HERE = "this server runs one model, and nothing beside it"


class PromptBody(Body):
    """The body of /v1/messages/count_tokens: the fields that make the prompt."""

    REFUSED: ClassVar[Refused] = {
        "container": ((), _NOT_HERE),
        "context_management": ((), "expected messages as the model is to read them"),
        "diagnostics": ((), _NOT_HERE),
        "inference_geo": ((), _NOT_HERE),
        "mcp_servers": (([],), _NOT_HERE),
        "service_tier": (("auto", "standard_only"), "there is one tier"),
        "speed": (("standard",), "there is one speed"),
        "thinking": (({"type": "disabled"},), "the model does not think before it answers"),
        "thread": ((), "nothing is stored; expected the whole conversation as messages"),
        "user_profile_id": ((), _NOT_HERE),
        "workspace_id": ((), _NOT_HERE),
    }

    model: str
    messages: Some[Message] = Field(min_length=1)
    system: str | Some[dict[str, Any]] | None = None
    tools: Some[Tool] | None = None
    tool_choice: Choice | None = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = None

    def functions(self, bounds: Bounds) -> Functions:
        choice = self.tool_choice
        return Functions.of(
            [
                Function(name=tool.name, description=tool.description, parameters=tool.input_schema, strict=tool.strict)
                for tool in self.tools or []
            ],
            choice.as_turn_has_it() if choice else None,
            not (choice and choice.disable_parallel_tool_use),
            bounds,
        )

    def conversation(self, bounds: Bounds) -> list[dict[str, Any]]:
        """The messages as chat templates read them. Raises ApiError."""
        if len(self.messages) > bounds.messages:
            raise wrong(f"messages has {len(self.messages)} items; expected at most {bounds.messages}", "messages")
        found: list[dict[str, Any]] = []
        if self.system:
            found.append({"role": "system", "content": _text(self.system, "system")})
        for n, message in enumerate(self.messages):
            found += _written(message, f"messages.{n}.content")
        if self.continues:
            if found[-1].get("tool_calls"):
                raise wrong("messages ends with a tool_use; expected its tool_result after it", "messages")
            if (text := found[-1]["content"]) != text.rstrip():  # as Anthropic: the next token begins with the blank
                raise wrong(
                    "messages ends with one of the assistant that ends with a blank; expected none at its end",
                    "messages",
                )
        return in_order_of_calls(found, "tool_use_id")

    @property
    def continues(self) -> bool:
        """Whether the answer continues the last message."""
        return self.messages[-1].role == "assistant"


class MessagesBody(PromptBody):
    """The body of /v1/messages."""

    max_tokens: int
    metadata: Metadata | None = None
    stop_sequences: Some[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None

    @property
    def user(self) -> str | None:
        return self.metadata.user_id if self.metadata else None

    def names(self) -> dict[str, str]:
        return super().names() | {"stop": "stop_sequences", "json_schema": "output_config.format.schema"}

    def turn(self, bounds: Bounds) -> Turn:
        """The turn that the body asks for. Raises ApiError."""
        if len(self.stop_sequences or []) > bounds.stops:
            found = len(self.stop_sequences or [])
            raise wrong(f"stop_sequences has {found} strings; expected at most {bounds.stops}", "stop_sequences")
        functions, form = self.functions(bounds), self.output_config and self.output_config.format
        given: dict[str, Any] = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "stop": self.stop_sequences,
            **functions.forms({"json_schema": form.schema_} if form else {}, self.names()),
        }
        try:
            params = SamplingParams(
                max_tokens=self.max_tokens, **{name: value for name, value in given.items() if value is not None}
            )
        except RequestError as error:
            raise errors.of(error, self.names()) from None
        return Turn(
            [self.conversation(bounds)],
            params,
            tools=functions.tools,
            continues=self.continues,
            shortens=True,  # clients send max_tokens of 16,384 or 32,000 by default
            is_streamed=bool(self.stream),
        )


def _text(content: str | list[dict[str, Any]], place: str) -> str:
    """The text of a string, or of blocks of text."""
    if isinstance(content, str):
        return content
    return "\n".join(blocks.read(_TEXT, block, f"{place}.{n}").text for n, block in enumerate(content))


def _written(message: Message, place: str) -> list[dict[str, Any]]:
    """A message as chat templates read it: its calls are in the field tool_calls, and each result is a message of its
    own. Raises ApiError."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    found: list[dict[str, Any]] = []
    texts: list[str] = []
    calls: list[dict[str, Any]] = []

    def end_text() -> None:
        if texts:
            found.append({"role": message.role, "content": "\n".join(texts)})
            texts.clear()

    for n, value in enumerate(message.content):
        block = blocks.read(_BLOCKS[message.role], value, f"{place}.{n}")
        if isinstance(block, ToolResult):
            end_text()
            text = _text(block.content or "", f"{place}.{n}.content")
            text = f"Error: {text}" if block.is_error else text
            found.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": text})
        elif isinstance(block, ToolUse):
            function = {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}
            calls.append({"id": block.id, "type": "function", "function": function})
        else:
            texts.append(block.text)
    if calls:
        return [{"role": "assistant", "content": "\n".join(texts), "tool_calls": calls}]
    end_text()
    if not found:
        raise wrong(f"{place} is an empty list; expected at least one block", place)
    return found
