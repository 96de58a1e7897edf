"""Function calls in the text of a model, as Qwen2.5's chat template writes them (the Hermes format):

<tool_call>
{"name": "tide", "arguments": {"place": "Emden"}}
</tool_call>
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import RequestError, shown
from .json_object import JsonObject

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_BLANKS = " \t\r\n"
_HEAD = re.compile(  # of the JSON, up to the arguments
    rf'[{_BLANKS}]*\{{[{_BLANKS}]*"name"[{_BLANKS}]*:[{_BLANKS}]*"(?P<name>[^"\\\x00-\x1f\ud800-\udfff]+)"'
    rf'[{_BLANKS}]*,[{_BLANKS}]*"arguments"[{_BLANKS}]*:[{_BLANKS}]*(?=\{{)'
)
_LONGEST_HEAD = 256  # characters; a call with a longer head is only reported as a whole
# As the template's `tojson` writes them. If a model could choose the blanks, it might write blanks up to its limit.
_SPACING = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}


@dataclass(frozen=True)
class Call:
    """A complete call of a function: `arguments` is the JSON text of an object."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Begun:
    """A call begins. Arguments follow, and finally either Call or Broken."""

    name: str


@dataclass(frozen=True)
class Arguments:
    """The next part of the arguments of a call that has begun. All parts so far are the beginning of a JSON object."""

    text: str


@dataclass(frozen=True)
class Broken:
    """The text that began like a call is not a call: its arguments do not end. The text follows."""


Part = str | Begun | Arguments | Call | Broken


class ToolCalls:
    """Splits the text of one answer, as it is generated, into plain text and calls.

    The result does not depend on where the text is cut into pieces. Blanks before and after a call are dropped, because
    the template writes its own. A block that is not a call is returned as text, and so is an unfinished block, unless
    only its closing tag is missing. A tag within a string of a call's JSON belongs to the string.

    names: a call of one of these functions is reported from the start of its arguments on. Any other call is reported
    when it is complete.
    """

    def __init__(self, names: Collection[str] = ()) -> None:
        self._names = names
        self._held = ""  # blanks that may precede a tag, and the beginning of a tag or of a block
        self._inside = 0  # the position in `_held` where the JSON of a block begins; 0 outside of blocks
        self._read = 0  # the position in `_held` up to which the JSON was read
        self._string = _Strings()
        self._may_begin = False  # whether a call may still be reported as begun in this block
        self._arguments: JsonObject | None = None  # of the call that has begun
        self._told = 0  # characters of the arguments that were returned
        self._follows_call = False  # whether only blanks have come since the last call

    def add(self, text: str) -> list[Part]:
        """Adds text. Returns the parts that are now certain; half a tag is held back."""
        self._held += text
        found: list[Part] = []
        while self._end_block(found) if self._inside else self._end_text(found):
            pass
        return found

    def finish(self) -> list[Part]:
        """Ends the text. Returns the parts that were held back."""
        found: list[Part] = []
        if self._inside:
            self._close(found, len(self._held), len(self._held))
        else:
            self._emit(found, self._held)
        self._held = ""
        return found

    def _end_text(self, found: list[Part]) -> bool:
        """Moves the text before the next block to `found`. Returns whether a block begins."""
        held = self._held
        tag = held.find(_OPEN)
        end = tag if tag >= 0 else _before_a_tag(held, 0, (_OPEN,))
        kept = len(held[:end].rstrip(_BLANKS))
        self._emit(found, held[:kept])
        self._held = held[kept:]
        if tag >= 0:
            self._inside = self._read = tag + len(_OPEN) - kept
            self._string, self._may_begin = _Strings(), bool(self._names)
        return tag >= 0

    def _end_block(self, found: list[Part]) -> bool:
        """Moves the block to `found` if it ends. Returns whether there is more text to read."""
        tags = [(at, tag) for tag in (_OPEN, _CLOSE) if (at := self._held.find(tag, self._read)) >= 0]
        if not tags:
            self._advance(found, _before_a_tag(self._held, self._read, (_OPEN, _CLOSE)))
            return False
        at, tag = min(tags)
        self._advance(found, at)
        if self._string.may_hold_a_tag():
            self._advance(found, at + len(tag))
        else:
            self._close(found, at, at if tag == _OPEN else at + len(tag))
        return True

    def _advance(self, found: list[Part], end: int) -> None:
        """Reads the JSON of the block up to `end`."""
        more, self._read = self._held[self._read : end], end
        self._string.read(more)
        if self._may_begin:
            head = _HEAD.match(self._held, self._inside, min(end, self._inside + _LONGEST_HEAD))
            if head and head["name"] in self._names:
                found.append(Begun(head["name"]))
                self._arguments, self._told, more = JsonObject(), 0, self._held[head.end() : end]
            self._may_begin = not head and end < self._inside + _LONGEST_HEAD
        if self._arguments:
            text = self._arguments.add(more)
            text = text[:-1] if self._arguments.is_whole else text  # the last brace belongs to the complete Call only
            found += [Arguments(text)] if text else []
            self._told += len(text)

    def _close(self, found: list[Part], json_end: int, end: int) -> None:
        """Ends the block. Its JSON ends at `json_end`, the block itself at `end`."""
        call = _read_call(self._held[self._inside : json_end])
        if call is None:
            if self._arguments:
                found.append(Broken())
            self._emit(found, self._held[:end])
        else:
            if not self._arguments:
                found += [Begun(call.name), Arguments(call.arguments)]
            elif rest := call.arguments[self._told :]:
                found.append(Arguments(rest))
            found.append(call)
            self._follows_call = True
        self._held = self._held[end:]
        self._inside, self._arguments = 0, None

    def _emit(self, found: list[Part], text: str) -> None:
        if self._follows_call:
            text = text.lstrip(_BLANKS)
        if text:
            found.append(text)
            self._follows_call = False


def _before_a_tag(text: str, start: int, tags: Sequence[str]) -> int:
    """The length of the text without the beginning of a tag that it may end with, from `start` on."""
    at = text.rfind("<", max(start, len(text) - len(_CLOSE) + 1))
    return at if at >= 0 and any(tag.startswith(text[at:]) for tag in tags) else len(text)


class _Strings:
    """Tracks where strings of a JSON text begin and end."""

    def __init__(self) -> None:
        self._is_open = False
        self._is_escaped = False
        self._is_broken = False  # whether the string has a control character that JSON escapes, such as a line feed

    def may_hold_a_tag(self) -> bool:
        """Whether the text up to here ends within a string. A string with a line feed was probably never closed, and
        does not count."""
        return self._is_open and not self._is_broken

    def read(self, text: str) -> None:
        for character in text:
            if not self._is_open:
                self._is_open = character == '"'
                self._is_broken = False
            elif self._is_escaped:
                self._is_escaped = False
            elif character == "\\":
                self._is_escaped = True
            elif character == '"':
                self._is_open = False
            elif character < " ":
                self._is_broken = True


def _read_call(text: str) -> Call | None:
    """The call in the JSON of a block, or None. The text of the arguments does not change if they follow the name, as
    in the template."""
    if head := _HEAD.match(text, 0, _LONGEST_HEAD):
        written = (read := JsonObject()).add(text[head.end() :])
        return Call(head["name"], written) if read.is_whole and read.rest.strip(_BLANKS) == "}" else None
    try:
        call = _read_json(text)
        if not isinstance(call, dict) or not call.keys() <= {"name", "arguments"}:
            return None
        name, arguments = call.get("name"), call.get("arguments")
        if isinstance(arguments, str):  # JSON text within JSON, as in OpenAI's interface
            arguments = _read_json(arguments)
        elif arguments is None:
            arguments = {}
        if not isinstance(name, str) or not name or not isinstance(arguments, dict):
            return None
        written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        (name + written).encode()  # fails for lone surrogates, which a response cannot contain
        return Call(name, written)
    except (ValueError, RecursionError):
        return None


def _read_json(text: str) -> Any:
    # Small models write unescaped line feeds within strings, above all in code. Their meaning is clear.
    return json.loads(text, strict=False, parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def call_grammar(
    tools: Sequence[Mapping[str, Any]], choice: str, parallel: bool, answer: Mapping[str, Any] | None = None
) -> str:
    """A grammar for SamplingParams(grammar=...), in llguidance's Lark syntax, that allows only valid function calls.

    tools: {"type": "function", "function": {"name": ..., "parameters": JSON schema}} each.
    choice: "required" for calls only, "function:NAME" for calls of this function only, "auto" for text that may hold
    calls. parallel: whether there may be several calls, one after the other. answer: with "auto", the JSON schema of a
    text without calls; a text with calls then contains only calls.

    Raises RequestError for tools that the grammar cannot express, and for an unknown choice.
    """
    functions = [_function(tool, f"tools[{n}]") for n, tool in enumerate(tools)]
    wanted = choice.removeprefix("function:") if choice.startswith("function:") else None
    if wanted is not None:
        functions = [(name, schema) for name, schema in functions if name == wanted]
        if not functions:
            names = [tool["function"]["name"] for tool in tools]
            raise RequestError(f"tool_choice names the function {shown(wanted)}; expected one of {shown(names)}")
    elif choice not in ("auto", "required"):
        raise RequestError(f"tool_choice is {shown(choice)}; expected 'auto', 'required' or 'function:NAME'")
    if not functions:
        raise RequestError(f"tool_choice is {shown(choice)}, and there are no tools; expected at least one")
    rules = [f"call: {' | '.join(f'call_{n}' for n in range(len(functions)))}"]
    for n, (name, schema) in enumerate(functions):
        # Strings in Lark have JSON's syntax.
        before = json.dumps(f'\n{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": ')
        after = json.dumps(f"}}\n{_CLOSE}")
        rules.append(f"call_{n}: {before} arguments_{n} {after}")
        rules.append(f"arguments_{n}: %json {json.dumps({**schema, 'x-guidance': _SPACING})}")
    following = f'("\\n{_OPEN}" call)*' if parallel else ""
    if choice == "auto" and answer is not None:
        rules.append(f"answer: %json {json.dumps(answer)}")
        start = f'start: answer | "{_OPEN}" call {following}'
    elif choice == "auto":
        rules += ["TEXT: /(.|\\n)*/", f'opened[lazy]: TEXT "{_OPEN}"']
        start = "start: (opened call)* TEXT" if parallel else "start: TEXT | opened call"
    else:
        start = f'start: "{_OPEN}" call {following}'
    return "\n".join([start, *rules]) + "\n"


def _function(tool: Mapping[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    """The name of a function, and the schema of its arguments."""
    function = tool.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str):
        raise RequestError(f"{where}: found {shown(tool)}; expected a function with a name")
    schema = function.get("parameters")
    if schema is None:  # in OpenAI's interface: the function has no arguments
        return name, {"type": "object", "properties": {}, "additionalProperties": False}
    if not isinstance(schema, Mapping) or schema.get("type", "object") != "object":
        raise RequestError(f"{where}: parameters are {shown(schema)}; expected a JSON schema of type 'object'")
    return name, {"type": "object", **schema}
