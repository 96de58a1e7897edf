"""Checks messages from clients of chat servers, and converts them to what chat templates expect.

OpenAI's interface allows these values, which templates do not read:

    content as parts of text      the parts are joined with a line feed, as in llama.cpp and vLLM (transformers' server
                                  joins with a space)
    "arguments" as JSON text      replaced by the object in the text; text that is not JSON stays, as in llama.cpp
    content null                  the key is removed, unless the template tests whether content is none
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..errors import RequestError, shown

DEEPEST = 100  # levels of nesting
_TEXT_PARTS = ("text", "input_text", "output_text")


def plain(value: Any, name: str, on_text: Callable[[str], str] = str.__str__, depth: int = 0) -> Any:
    """A copy of `value` in plain JSON types. `on_text` is applied to every string in it, also to dictionary keys.

    Raises RequestError, which names the argument `name`, for any other type, because a template could call an object's
    methods. It also raises for values that are nested more than DEEPEST levels deep or contain themselves.
    """
    if isinstance(value, str):
        return on_text(value)
    if value is None or type(value) in (bool, int, float):
        return value
    if depth > DEEPEST:
        raise RequestError(f"{name} is nested more than {DEEPEST} levels deep, or contains itself")
    if isinstance(value, Mapping):
        return {_key(key, name, on_text): plain(item, name, on_text, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, name, on_text, depth + 1) for item in value]
    if isinstance(value, float):
        return float(value)
    try:
        return operator.index(value)  # numpy's integers, enumerations
    except TypeError:
        found = f"{name} holds a {type(value).__name__}; expected strings, numbers, lists and dicts only"
        raise RequestError(found) from None


def _key(key: Any, name: str, on_text: Callable[[str], str]) -> Any:
    if not isinstance(key, (str, int, float)) and key is not None:
        raise RequestError(f"{name} holds a dict with a key of type {type(key).__name__}; expected strings")
    return plain(key, name, on_text)


def size(value: Any) -> int:
    """The number of characters in plain values, plus 16 for each item."""
    if isinstance(value, str):
        return 16 + len(value)
    if isinstance(value, dict):
        return 16 + sum(size(key) + size(item) for key, item in value.items())
    return 16 + (sum(map(size, value)) if isinstance(value, list) else 0)


def unused_characters(text: str) -> Iterator[str]:
    """Unicode's private-use characters that are not in this text."""
    used = set(text)
    return (character for character in map(chr, range(0xF0000, 0x10FFFE)) if character not in used)


def read_messages(messages: Any, read_arguments: bool = True, keep_null: bool = False) -> list[dict[str, Any]]:
    """The messages in plain types, with text as content, and without keys whose value is None.

    read_arguments: whether arguments of tool calls that are JSON text are parsed.
    keep_null: whether content that is None stays in a message with tool calls only.
    Raises RequestError, naming the message and the field.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        found = "an empty one" if isinstance(messages, (list, tuple)) else f"a {type(messages).__name__}"
        raise RequestError(f"messages: found {found}; expected a list of at least one dict with role and content")
    return [_read(message, f"messages[{n}]", read_arguments, keep_null) for n, message in enumerate(messages)]


def check_can_go_on(messages: Any) -> None:
    """Raises RequestError if the last message has no content that can be continued."""
    last = messages[-1] if isinstance(messages, (list, tuple)) and messages else None
    if isinstance(last, Mapping) and (last.get("tool_calls") or last.get("content") is None):
        found = "has tool calls" if last.get("tool_calls") else "has no content"
        raise RequestError(f"messages: the last one {found}; expected a text that can be continued")


def _read(message: Any, name: str, read_arguments: bool, keep_null: bool) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(f"{name} is a {type(message).__name__}; expected a dict with role and content")
    if not isinstance(message.get("role"), str):
        raise RequestError(f"{name}: role is {shown(message.get('role'))}; expected a string such as 'user'")
    read = {key: value for key, value in plain(message, name).items() if value is not None}
    calls = read.get("tool_calls", [])
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise RequestError(f"{name}: tool_calls is {shown(calls)}; expected a list of dicts, one call each")
    content = read.get("content")
    if isinstance(content, list):
        read["content"] = "\n".join(_text_of(part, f"{name}.content[{n}]") for n, part in enumerate(content))
    elif not isinstance(content, str) and not (content is None and calls):
        found = "missing" if content is None else f"a {type(content).__name__}"
        raise RequestError(f"{name}: content is {found}; expected a string, or a list of parts of type 'text'")
    elif content is None and keep_null:
        read["content"] = None
    if read_arguments:
        for call in calls:
            function = call["function"] if isinstance(call.get("function"), dict) else call
            if isinstance(function.get("arguments"), str):
                arguments = _read_json(function["arguments"])
                function["arguments"] = plain(arguments, f"{name}: the arguments of a tool call")
    return read


def _text_of(part: Any, name: str) -> str:
    if not isinstance(part, dict):
        raise RequestError(f"{name} is a {type(part).__name__}; expected a dict with type and text")
    if part.get("type") not in _TEXT_PARTS:
        raise RequestError(
            f"{name} is of type {shown(part.get('type'), 40)}; expected 'text', because the model reads nothing else"
        )
    if not isinstance(part.get("text"), str):
        raise RequestError(f"{name}: text is {shown(part.get('text'), 40)}; expected a string")
    return part["text"]


def _read_json(text: str) -> Any:
    if not text.strip():
        return {}  # some clients send this for a call without arguments
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text  # the model wrote it, and it need not be JSON
