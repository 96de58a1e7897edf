"""Reads a JSON object in pieces, so that each piece can be passed on before the rest comes."""

from __future__ import annotations

import json
import math
import re

from .messages import DEEPEST

MOST_CHARACTERS = 1000  # characters of a number
_BLANKS = re.compile(r"[ \t\r\n]+")
_SCALAR = re.compile(  # with what follows, without which a number might go on
    r"(?:true|false|null|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)(?=[ \t\r\n,\]}])"
)
_HEX = "[0-9a-fA-F]"
_CHARACTERS = re.compile(  # of a string; surrogates in pairs only
    r'(?:[^"\\\ud800-\udfff]+|\\["\\/bfnrt]'
    rf"|\\u(?:[0-9a-ce-fA-CE-F]{_HEX}{{3}}|[dD][0-7]{_HEX}{{2}}|[dD][89abAB]{_HEX}{{2}}\\u[dD][c-fC-F]{_HEX}{{2}}))*"
)
_ESCAPES = {code: json.dumps(chr(code))[1:-1] for code in range(32)}


class JsonObject:
    """A JSON object that comes in pieces.

    Its text does not change, except that control characters in strings, such as a line feed, are escaped. JSON does not
    allow them, but small models write them, above all in code, and their meaning is clear.
    """

    def __init__(self) -> None:
        self.is_whole = False
        self.rest = ""  # text that is not part of the object, or may not be
        self._open = ""  # the open brackets
        self._wants = "value"  # "key", ":", "value", or "," after a value
        self._may_close = False  # whether an empty object or array may end here
        self._is_in_string = False

    def add(self, text: str) -> str:
        """Adds text, and returns the next part of the object. All returned parts together are the beginning of a JSON
        object with finite numbers and at most DEEPEST levels. After text that cannot be part of an object, nothing more
        is returned."""
        self.rest += text
        found, at = [], 0
        while at < len(self.rest) and not self.is_whole:
            is_in_string = self._is_in_string
            end = self._end_of_characters(at) if is_in_string else self._end_of_lexeme(at)
            if end == at:
                break
            piece = self.rest[at:end]
            found.append(piece.translate(_ESCAPES) if is_in_string else piece)
            at = end
        self.rest = self.rest[at:]
        return "".join(found)

    def _end_of_characters(self, at: int) -> int:
        characters = _CHARACTERS.match(self.rest, at)
        assert characters
        if characters.end() == at and self.rest.startswith('"', at):
            self._is_in_string = False
            self._wants = ":" if self._wants == "key" else ","
            return at + 1
        return characters.end()

    def _end_of_lexeme(self, at: int) -> int:
        """The end of the lexical element that begins at ``at``. Returns ``at`` if more text is needed to find the end,
        or if the text is not JSON."""
        if blanks := _BLANKS.match(self.rest, at):
            return blanks.end()
        character, wants, may_close = self.rest[at : at + 1], self._wants, self._may_close
        if character in ("}", "]"):
            if (wants != "," and not may_close) or self._open[-1:] != {"}": "{", "]": "["}[character]:
                return at
            self._open, self._wants, self._may_close = self._open[:-1], ",", False
            self.is_whole = not self._open
        elif character == '"' and wants in ("key", "value") and self._open:
            self._is_in_string, self._may_close = True, False
        elif character == ":" and wants == ":":
            self._wants = "value"
        elif character == "," and wants == ",":
            self._wants = "key" if self._open[-1] == "{" else "value"
        elif character == "{" and wants == "value" and len(self._open) < DEEPEST:
            self._open, self._wants, self._may_close = self._open + character, "key", True
        elif character == "[" and wants == "value" and 0 < len(self._open) < DEEPEST:
            self._open, self._may_close = self._open + character, True
        else:
            return self._end_of_scalar(at) if wants == "value" and self._open else at
        return at + 1

    def _end_of_scalar(self, at: int) -> int:
        scalar = _SCALAR.match(self.rest, at, at + MOST_CHARACTERS + 1)
        if not scalar:
            return at
        if scalar[0][0] not in "tfn" and not math.isfinite(float(scalar[0])):  # Python reads 1e999 as infinity
            return at
        self._wants, self._may_close = ",", False
        return scalar.end()
