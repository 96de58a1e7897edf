"""Constraints on a text: a JSON schema, a regular expression, a choice of texts, or a grammar.

This module checks and bounds them, without llguidance. grammar_compiler.py compiles them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

from ..errors import RequestError, shown

MAX_GRAMMAR_BYTES = 2**16  # of a schema as JSON text, a regular expression, a grammar, or all choices together
MAX_SCHEMA_DEPTH = 64  # levels of nested objects and arrays
MAX_CHOICES = 1024
KINDS = ("json_schema", "regex", "choice", "grammar")  # fields of SamplingParams; at most one is given

_DATA = ("const", "enum", "default", "examples")  # keywords of JSON schema whose values are data, not schemas


class Grammar(NamedTuple):
    """A constraint, as the compiler takes it."""

    kind: str  # one of KINDS
    source: str  # the schema as JSON text, the expression, the grammar, or the choices as a JSON list


def only_one_of(values: dict[str, Any]) -> None:
    """Raises RequestError if more than one of these fields is given."""
    given = [name for name, value in values.items() if value is not None]
    if len(given) > 1:
        raise RequestError(f"{' and '.join(given)} are given; expected one of {', '.join(values)} at most")


def json_schema(name: str, value: Any) -> str | None:
    """A schema as JSON text. ``value`` is a dict, JSON text, True (any object), a pydantic class, or None.

    Raises RequestError."""
    if value is None:
        return None
    if isinstance(value, str):
        value = _parsed(name, value)
    elif value is True:
        value = {"type": "object"}
    elif isinstance(value, type) and callable(schema_of := getattr(value, "model_json_schema", None)):
        try:
            value = schema_of()
        except Exception as error:  # pydantic's own error, for a type that has no JSON schema
            raise RequestError(f"{name} is {shown(value)}, which has no JSON schema: {error}") from error
    if not isinstance(value, dict):
        raise RequestError(
            f"{name} is {shown(value)}; expected a JSON schema as a dict or JSON text of an object, True for any "
            "object, a class of pydantic, or None"
        )
    check_schema(name, value)
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{name} is {shown(value)}; expected what JSON can hold: {error}") from error
    return _bounded(name, text)


def check_schema(name: str, schema: Any) -> None:
    """Raises RequestError for a schema that is nested too deep, that is too large, or whose properties llguidance
    would count wrongly."""
    _check_depth(name, schema)
    _check_counts(name, schema)


def expression(name: str, value: Any) -> str | None:
    """A regular expression, or a grammar in llguidance's Lark syntax. Raises RequestError if ``value`` is not a text,
    is empty, or is too large."""
    if value is not None and (not isinstance(value, str) or not value):
        raise RequestError(f"{name} is {shown(value)}; expected a text that is not empty, or None")
    return None if value is None else _bounded(name, value)


def choices(name: str, value: Any) -> tuple[str, ...] | None:
    """The texts to choose from, without duplicates. Raises RequestError for an empty list or text, or for too many."""
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(text, str) and text for text in value):
        raise RequestError(f"{name} is {shown(value)}; expected a list of texts that are not empty, or None")
    if len(value) > MAX_CHOICES:
        raise RequestError(f"{name} has {len(value)} texts; expected {MAX_CHOICES} at most")
    _bounded(name, "".join(value))
    return tuple(dict.fromkeys(value))


def grammar_of(params: Any) -> Grammar | None:
    """The constraint of these SamplingParams, or None."""
    for kind in KINDS:
        value = getattr(params, kind)
        if value is not None:
            return Grammar(kind, value if isinstance(value, str) else json.dumps(value))
    return None


def _parsed(name: str, text: str) -> Any:
    _bounded(name, text)
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{name} is {shown(text)}; expected JSON: {error}") from error


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def _bounded(name: str, text: str) -> str:
    try:
        size = len(text.encode())
    except UnicodeEncodeError as fault:
        found = f"a lone surrogate, U+{ord(text[fault.start]):04X}"
        raise RequestError(f"{name} has {found}; expected text that UTF-8 can hold") from fault
    if size > MAX_GRAMMAR_BYTES:
        raise RequestError(f"{name} has {size} bytes; expected {MAX_GRAMMAR_BYTES} at most")
    return text


def _check_depth(name: str, value: Any) -> None:
    """Goes level by level, because recursion into a deep value would exhaust Python's stack."""
    level, depth, count = [value], 0, 0
    while level:
        depth, count = depth + 1, count + len(level)
        if depth > MAX_SCHEMA_DEPTH or count > MAX_GRAMMAR_BYTES:  # a value that contains itself exceeds one of them
            raise RequestError(
                f"{name} has more than {MAX_SCHEMA_DEPTH} objects and arrays within each other, or more than "
                f"{MAX_GRAMMAR_BYTES} in all; expected fewer"
            )
        level = [part for each in level for part in _parts(each) if isinstance(part, (dict, list, tuple))]


def _check_counts(name: str, schema: Any) -> None:
    """Raises RequestError for a minProperties that an answer could reach with duplicate keys only: llguidance counts
    a repeated key as another property, and JSON parsers do not."""
    if isinstance(schema, dict):
        least, required = schema.get("minProperties"), schema.get("required")
        given = len(required) if isinstance(required, list) else 0
        if isinstance(least, int) and least > max(1, given):
            raise RequestError(
                f"{name} is not supported: minProperties {least} with {given} required properties; expected 1 at most, "
                "or as many required ones"
            )
        for key, part in schema.items():
            if key not in _DATA:
                _check_counts(name, part)
    elif isinstance(schema, list):
        for part in schema:
            _check_counts(name, part)


def _parts(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value
