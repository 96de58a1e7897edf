"""Functions that a model may call: reads them and the calls of a conversation from bodies, for a Turn, and splits
answers into text and calls."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from ..errors import RequestError, shown
from ..sampling.grammar import MAX_GRAMMAR_BYTES, check_schema, json_schema
from ..sampling.grammar_compiler import WHITESPACE
from ..text.tools import Arguments, Begun, Call, Part, ToolCalls, call_grammar
from . import errors
from .bodies import Body
from .errors import ApiError
from .settings import Bounds
from .turns import CallArguments, CallBegun, CallBroken, CallEvent, ToolCall

_SPACING = {"whitespace_pattern": WHITESPACE}  # within an answer that has a schema, as without functions
Name = Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]


class Function(Body):
    """A function, as OpenAI's APIs describe one."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None  # a JSON schema of the arguments
    strict: bool | None = None  # whether a grammar forces calls to follow the schema


class CalledFunction(Body):
    name: Annotated[str, Field(min_length=1)]
    arguments: str  # JSON text, if the model wrote any
    parsed_arguments: Any = Field(None, exclude=True)  # OpenAI's client adds the arguments, parsed


class CallMade(Body):
    """A call in a message of the assistant, as /v1/chat/completions has it."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = Field(None, exclude=True)  # of the call in a stream


@dataclass(frozen=True)
class Functions:
    """The functions of a turn, checked."""

    tools: list[dict[str, Any]]  # as chat templates read them; empty if the model must not call any
    choice: str  # "none", "auto", "required", or "function:NAME"
    is_parallel: bool  # whether an answer may have several calls
    is_strict: bool  # whether at least one function is strict

    @classmethod
    def of(
        cls, functions: Sequence[Function], choice: str | None, is_parallel: bool | None, bounds: Bounds
    ) -> Functions:
        """Checks functions. Raises ApiError for too many, for two of one name, and for a choice of an unknown one."""
        if len(functions) > bounds.tools:
            raise _wrong(f"tools has {len(functions)} functions; expected at most {bounds.tools}", "tools")
        names = [function.name for function in functions]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise _wrong(f"tools has {twice} twice; expected different names", "tools")
        choice = choice or ("auto" if functions else "none")
        named = choice.removeprefix("function:") if choice.startswith("function:") else None
        if named is not None and named not in names:
            raise _wrong(f"tool_choice names {shown(named)}, which is not among tools", "tool_choice")
        if choice == "required" and not functions:
            raise _wrong("tool_choice is 'required', and there are no tools; expected at least one", "tool_choice")
        shown_to_model = [] if choice == "none" else functions
        read = {"name", "description", "parameters"}
        tools = [
            {"type": "function", "function": function.model_dump(exclude_none=True, include=read)}
            for function in shown_to_model
        ]
        is_strict = any(function.strict for function in shown_to_model)
        return cls(tools, choice if tools else "none", is_parallel is not False, is_strict)

    def forms(self, form: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
        """The constraint on the text, as fields of SamplingParams: calls follow the choice, the schemas of strict
        functions and is_parallel, and an answer without calls follows ``form``.

        form: the constraint that the client asks for, as a field of SamplingParams, or empty. names: fields of
        SamplingParams -> the fields of the body. Raises ApiError."""
        if not self.tools:
            return form
        for kind in form.keys() - {"json_schema"}:
            message = f'{names[kind]} is given beside tools; expected a JSON schema, or tool_choice: "none"'
            raise _wrong(message, names[kind])
        try:
            schema = json_schema("json_schema", form.get("json_schema"))
        except RequestError as error:
            raise errors.of(error, names) from None
        grammar = self._grammar({**json.loads(schema), "x-guidance": _SPACING} if schema else None)
        return {"grammar": grammar} if grammar else {}

    def _grammar(self, answer: dict[str, Any] | None) -> str | None:
        if self.choice == "auto" and self.is_parallel and not self.is_strict and answer is None:
            return None
        try:
            for n, tool in enumerate(self.tools):
                if self.choice in ("auto", "required", f"function:{tool['function']['name']}"):
                    check_schema(f"tools[{n}]: parameters", tool["function"].get("parameters", {}))
            grammar = call_grammar(self.tools, self.choice, self.is_parallel, answer)
        except RequestError as error:
            raise errors.of(error, {"tools": "tools", "tool_choice": "tool_choice"}) from None
        if (size := len(grammar.encode())) > MAX_GRAMMAR_BYTES:
            sizes = [len(json.dumps(tool)) for tool in self.tools]
            n = sizes.index(max(sizes))
            message = f"tools make a grammar of {size} bytes; expected {MAX_GRAMMAR_BYTES} at most"
            raise _wrong(f"{message}: the largest is tools[{n}], {self.tools[n]['function']['name']}", "tools")
        return grammar


def choice_of(value: str | Mapping[str, Any] | None, name_at: Sequence[str]) -> str | None:
    """OpenAI's tool_choice as the choice of Functions. name_at: the keys that lead to the name of a chosen function.
    Raises ApiError."""
    if value is None or value in ("none", "auto", "required"):
        return value
    if isinstance(value, Mapping) and value.get("type") == "function":
        name: Any = value
        for key in name_at:
            name = name.get(key) if isinstance(name, Mapping) else None
        if isinstance(name, str) and value == {"type": "function", **_nested(name_at, name)}:
            return f"function:{name}"
    expected = {"type": "function", **_nested(name_at, "NAME")}
    raise _wrong(f"tool_choice is {shown(value)}; expected 'none', 'auto', 'required' or {expected}", "tool_choice")


def _nested(keys: Sequence[str], name: str) -> dict[str, Any]:
    return {keys[0]: _nested(keys[1:], name) if len(keys) > 1 else name}


def in_order_of_calls(messages: Sequence[dict[str, Any]], id_name: str = "tool_call_id") -> list[dict[str, Any]]:
    """The messages of a conversation, with the results of calls in the order of the calls: templates show no ids.

    id_name: the API's name for the field of a result that has the id of its call. Raises ApiError for a result whose
    call is not in the message before the results."""
    ordered: list[dict[str, Any]] = []
    results: list[tuple[int, dict[str, Any]]] = []
    calls: dict[str, int] = {}
    for message in messages:
        if message["role"] == "tool":
            call_id = message.get("tool_call_id")
            if call_id not in calls:
                found = "is missing" if call_id is None else f"is {shown(call_id)}"
                raise _wrong(
                    f"{id_name} of a result {found}; expected the id of a call in the assistant's message before it",
                    id_name,
                )
            results.append((calls[call_id], message))
            continue
        ordered += [result for _, result in sorted(results, key=lambda pair: pair[0])]
        results = []
        calls = {call["id"]: at for at, call in enumerate(message.get("tool_calls") or [])}
        ordered.append(message)
    return ordered + [result for _, result in sorted(results, key=lambda pair: pair[0])]


def without_grammar(error: RequestError, grammar: str) -> ApiError | RequestError:
    """The error for a client if llguidance refuses the grammar of its functions: it names the function and the reason.
    A RequestError if llguidance refuses the schema of the answer."""
    reason, lines = str(error), grammar.splitlines()
    place = re.search(r" at (\d+)\(\d+\): (.*?)( \d+ \| |$)", reason)  # line(column): reason, then quoted lines
    at = int(place[1]) if place else 0
    before, line = lines[at - 2 : at] if 2 <= at <= len(lines) else ("", "")
    name = re.match(r'call_\d+: "\\n{\\"name\\": \\"([\w-]+)', before)  # call_grammar writes this before each schema
    if place and line.startswith("answer: "):
        return RequestError(f"json_schema is not supported: {place[2]}")
    if place and name:
        return _wrong(f"tools: the function {name[1]} is not supported: {place[2]}", "tools")
    return _wrong(f"tools have no grammar: {reason}", "tools")


class Splitter:
    """Splits the text of one answer, piece by piece, into text and calls. tools: those of the turn."""

    def __init__(self, index: int, tools: Sequence[Mapping[str, Any]]) -> None:
        self._index = index  # of the answer
        self._calls = ToolCalls({tool["function"]["name"] for tool in tools})
        self._id = ""  # of the call that has begun
        self.num_calls = 0

    def add(self, text: str, is_last: bool) -> list[str | CallEvent]:
        found = self._calls.add(text)
        if is_last:
            found += self._calls.finish()
        return [part if isinstance(part, str) else self._event(part) for part in found]

    def _event(self, part: Part) -> CallEvent:
        if isinstance(part, Arguments):
            return CallArguments(self._index, part.text)
        if isinstance(part, Begun):
            self._id = f"call_{uuid.uuid4().hex[:24]}"
            return CallBegun(self._index, self._id, part.name)
        if isinstance(part, Call):
            self.num_calls += 1
            return ToolCall(self._index, self._id, part.name, part.arguments)
        return CallBroken(self._index)


def _wrong(message: str, param: str) -> ApiError:
    return ApiError(400, message, param=param, code="invalid_value")
