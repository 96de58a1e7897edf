"""The request bodies of OpenAI's /v1/responses, and how they become turns. The server stores nothing between
requests."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from ..errors import RequestError
from ..sampling import SamplingParams
from . import blocks, errors
from .blocks import wrong
from .bodies import Body, Refused, Some
from .functions import Function, Functions, choice_of, in_order_of_calls
from .settings import Bounds
from .turns import Turn

LOGPROBS = "message.output_text.logprobs"
_Key = Annotated[str, Field(max_length=64)]  # of metadata; the limits are OpenAI's
_Value = Annotated[str, Field(max_length=512)]
Status = Literal["in_progress", "completed", "incomplete"]


class Part(Body):
    """A part of a message."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: list[Any] | None = Field(None, max_length=0)
    logprobs: list[Any] | None = None  # clients send them back with an answer


class Message(Body):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | Some[dict[str, Any]]
    id: str | None = None
    status: Status | None = None
    phase: str | None = None


class FunctionCall(Body):
    type: Literal["function_call"]
    call_id: str
    name: str = Field(min_length=1)
    arguments: str
    id: str | None = None
    status: Status | None = None


class FunctionCallOutput(Body):
    type: Literal["function_call_output"]
    call_id: str
    output: str | Some[dict[str, Any]]
    id: str | None = None
    status: Status | None = None


_PARTS: dict[str, type[Body]] = {"input_text": Part, "output_text": Part}
_ITEMS: dict[str, type[Body]] = {
    "message": Message,
    "function_call": FunctionCall,
    "function_call_output": FunctionCallOutput,
}


class Typed(Body):
    type: Literal["function"]


class Tool(Function, Typed):  # in this order, pydantic checks the type first: tools of other types may have no name
    """A function that the model may call."""


class Format(Body):
    """The format of the text."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None  # answers always follow the schema


class TextConfig(Body):
    format: Format | None = None
    verbosity: Literal["medium"] | None = None


class StreamOptions(Body):
    include_obfuscation: Literal[False] | None = None  # the server adds no padding


_NOTHING_STORED = "nothing is stored; expected the whole conversation as input"


class ResponsesBody(Body):
    """The body of a request."""

    REFUSED: ClassVar[Refused] = {
        "background": ((False,), "answers are given while the client waits"),
        "context_management": (([],), "expected input as the model is to read it"),
        "conversation": ((), _NOTHING_STORED),
        "max_tool_calls": ((), "there are no tools that the server calls itself"),
        "moderation": ((), "nothing is moderated"),
        "previous_response_id": ((), _NOTHING_STORED),
        "prompt": ((), _NOTHING_STORED),
        "prompt_cache_options": ((), "the cache keeps what it has room for"),
        "prompt_cache_retention": (("in_memory",), "the cache keeps what it has room for"),
        "reasoning": (({}, {"effort": "none"}), "the model does not reason before it answers"),
        "service_tier": (("auto", "default"), "there is one tier"),
        "store": ((False,), "nothing is stored"),
        "truncation": (("disabled",), "expected input that fits the context"),
    }

    model: str | None = None
    input: str | Some[dict[str, Any]]
    instructions: str | None = None
    include: Some[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = None
    max_output_tokens: int | None = None
    metadata: Annotated[dict[_Key, _Value], Field(max_length=16)] | None = None  # the response repeats it
    parallel_tool_calls: bool | None = None
    prompt_cache_key: str | None = None  # changes nothing: all requests share one cache
    safety_identifier: str | None = None  # for the log
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    text: TextConfig | None = None
    tool_choice: str | dict[str, Any] | None = None
    tools: Some[Tool] | None = None
    top_logprobs: int | None = None
    top_p: float | None = None
    user: str | None = None  # for the log
    # not OpenAI's
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None

    def names(self) -> dict[str, str]:
        more = {"max_tokens": "max_output_tokens", "json_schema": "text.format.schema", "logprobs": "top_logprobs"}
        return super().names() | more

    def turn(self, bounds: Bounds) -> Turn:
        """The turn that the body asks for. Raises ApiError."""
        if self.stream_options and not self.stream:
            raise wrong("stream_options needs stream: true", "stream_options")
        with_logprobs = LOGPROBS in (self.include or [])
        if self.top_logprobs is not None and not with_logprobs:
            raise wrong(f"top_logprobs needs {LOGPROBS!r} in include", "top_logprobs")
        if (self.top_logprobs or 0) > bounds.top_logprobs:
            raise wrong(f"top_logprobs is {self.top_logprobs}; expected at most {bounds.top_logprobs}", "top_logprobs")
        choice = choice_of(self.tool_choice, ("name",))
        functions = Functions.of(self.tools or [], choice, self.parallel_tool_calls, bounds)
        schema = self._schema()
        given: dict[str, Any] = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "seed": self.seed,
            "max_tokens": self.max_output_tokens,
            "logprobs": (self.top_logprobs or 0) if with_logprobs else None,
            **functions.forms({} if schema is None else {"json_schema": schema}, self.names()),
        }
        try:
            params = SamplingParams(**{name: value for name, value in given.items() if value is not None})
        except RequestError as error:
            raise errors.of(error, self.names()) from None
        return Turn(
            [self.conversation(bounds)],
            params,
            tools=functions.tools,
            is_streamed=bool(self.stream),
        )

    def _schema(self) -> dict[str, Any] | bool | None:
        form = self.text.format if self.text else None
        if form and form.type != "json_schema" and form.model_fields_set != {"type"}:
            raise wrong("text.format has more than a type; expected the type json_schema", "text.format")
        if form and form.type == "json_schema":
            if form.schema_ is None or form.name is None:
                raise wrong("text.format has no name or no schema; expected both", "text.format.schema")
            return form.schema_
        return True if form and form.type == "json_object" else None

    def conversation(self, bounds: Bounds) -> list[dict[str, Any]]:
        """The input as chat templates read it. Raises ApiError."""
        found: list[dict[str, Any]] = []
        if self.instructions is not None:
            found.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*found, {"role": "user", "content": self.input}]
        if not 0 < len(self.input) <= bounds.messages:
            raise wrong(f"input has {len(self.input)} items; expected 1 to {bounds.messages}", "input")
        for n, value in enumerate(self.input):
            place = f"input.{n}"
            item = blocks.read(_ITEMS, value, place, default="message")
            if isinstance(item, FunctionCallOutput):
                text = _text(item.output, f"{place}.output")
                found.append({"role": "tool", "tool_call_id": item.call_id, "content": text})
            elif isinstance(item, FunctionCall):  # belongs to the assistant's message before it, if there is one
                if not found or found[-1]["role"] != "assistant":
                    found.append({"role": "assistant", "content": None})
                function = {"name": item.name, "arguments": item.arguments}
                call = {"id": item.call_id, "type": "function", "function": function}
                found[-1].setdefault("tool_calls", []).append(call)
            else:
                text = _text(item.content, f"{place}.content")
                if item.role == "assistant" and found and found[-1].get("tool_calls"):  # text of an answer after calls
                    before = found[-1]["content"]
                    found[-1]["content"] = text if before is None else f"{before}\n{text}"
                else:
                    found.append({"role": item.role, "content": text})
        return in_order_of_calls(found, "call_id")


def _text(content: str | list[dict[str, Any]], place: str) -> str:
    """The text of a string or of a list of parts. Raises ApiError."""
    if isinstance(content, str):
        return content
    return "\n".join(blocks.read(_PARTS, part, f"{place}.{n}").text for n, part in enumerate(content))
