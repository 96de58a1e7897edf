"""Reads the body of a request as a pydantic model, with limits on its size, depth and number of values.

The server refuses by name a field that it does not implement. It reads `null` as an absent field.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, ValidationError, model_validator
from starlette.requests import Request

from ..errors import shown
from .errors import ApiError
from .settings import Bounds

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


# A field that the server does not implement -> (the values that it accepts because they change nothing, the reason).
Refused = Mapping[str, tuple[tuple[Any, ...], str]]


class Body(BaseModel):
    """The body of a request."""

    model_config = ConfigDict(extra="forbid", strict=True)
    REFUSED: ClassVar[Refused] = {}

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, fields: Any) -> Any:
        return _without_nulls(fields)

    def names(self) -> dict[str, str]:
        """The name of an argument, such as a field of SamplingParams -> the field of this body that it comes from."""
        return {name: name for name in type(self).model_fields}


B = TypeVar("B", bound=Body)
T = TypeVar("T")


class _FirstFault(FailFast):
    """pydantic's FailFast, but hashable, as annotations of types within a union must be."""

    __hash__ = object.__hash__


Some = Annotated[list[T], _FirstFault()]  # a list; pydantic reports its first fault only: it may have millions


async def received(request: Request, bounds: Bounds, grow: Callable[[int], None]) -> bytes:
    """The bytes of a JSON body. Calls ``grow`` with the number of bytes received so far. Raises ApiError, also that of
    ``grow``, and ClientDisconnect."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a foreign web page may send other types without a CORS preflight
        raise ApiError(415, f"the content type is {shown(kind)}; expected application/json")
    if (coding := request.headers.get("content-encoding", "identity")) != "identity":
        raise ApiError(415, f"the content encoding is {shown(coding)}; expected none")
    most = bounds.body_bytes
    too_large = ApiError(413, f"the body is larger than {most} bytes; expected at most {most}", code="body_too_large")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > most:
        raise too_large
    body = bytearray()

    async def take() -> None:
        async for part in request.stream():
            body.extend(part)
            if len(body) > most:
                raise too_large
            grow(len(body))

    try:
        await asyncio.wait_for(take(), bounds.body_seconds)
    except (asyncio.TimeoutError, TimeoutError):
        raise ApiError(408, f"the body did not arrive within {bounds.body_seconds:g} s") from None
    return bytes(body)


def parse(raw: bytes, model: type[B], bounds: Bounds) -> B:
    """Parses the bytes of a body. Raises ApiError."""
    fields = _json(raw, bounds)
    if not isinstance(fields, dict):
        raise ApiError(400, f"the body is {shown(fields)}; expected a JSON object", code="invalid_json")
    fields = _without_nulls(fields)
    for name, (neutral, reason) in model.REFUSED.items():
        if name in fields and _without_nulls(value := fields.pop(name)) not in neutral:
            message = f"{name} is {shown(value)}, which this server does not support: {reason}"
            raise ApiError(400, message, param=name, code="unsupported_parameter")
    known = {field.alias or name for name, field in model.model_fields.items()}
    if unknown := next((name for name in fields if name not in known), None):  # pydantic would list all of them
        raise _unknown(unknown)
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise _named(error, fields) from None


def _without_nulls(value: Any) -> Any:
    return {name: each for name, each in value.items() if each is not None} if isinstance(value, dict) else value


def _json(raw: bytes, bounds: Bounds) -> Any:
    def wrong(reason: object) -> ApiError:
        return ApiError(400, f"the body is not JSON: {reason}", code="invalid_json")

    if (count := _values(raw, bounds.values)) > bounds.values:  # a parsed value takes up to 100 times its bytes
        raise wrong(f"it has about {count} values; expected at most {bounds.values}")
    try:
        value = json.loads(
            raw.decode(), parse_constant=_refused, parse_float=_finite, object_pairs_hook=_without_duplicates
        )
        if _SURROGATE.search(raw):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise wrong(f"byte {error.start} is not UTF-8") from None
    except UnicodeEncodeError:
        raise wrong("it has a lone surrogate, which is not a character") from None
    except RecursionError:
        raise wrong(f"it is nested too deep; expected at most {bounds.depth} levels") from None
    except ValueError as error:
        raise wrong(error) from None
    if _depth(value) > bounds.depth:
        raise wrong(f"it is nested too deep; expected at most {bounds.depth} levels")
    return value


def _values(raw: bytes, most: int) -> int:
    """About how many values the body has. May be too small if the body has at most ``most``."""
    marks = (b",", b":", b"[", b"{")
    if sum(map(raw.count, marks)) <= most:
        return 0
    raw = raw.replace(b"\\\\", b"").replace(b'\\"', b"")  # each quote that is left begins or ends a text
    texts = raw.count(b'"') // 2
    return texts if texts > most else sum(map(b"".join(raw.split(b'"')[::2]).count, marks))


def _refused(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    if math.isinf(value := float(text)):
        raise ValueError(f"{text[:40]} is too large a number")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for twice, _ in pairs:
            if twice in seen:
                break
            seen.add(twice)
        raise ValueError(f"it has {shown(twice)} twice in one object")
    return found


def _depth(value: Any) -> int:
    """Levels of nesting, counted without recursion."""
    depth, level = 0, [value]
    while level := [each for each in level if isinstance(each, (dict, list))]:
        depth += 1
        level = [item for each in level for item in (each.values() if isinstance(each, dict) else each)]
    return depth


def _unknown(field: str) -> ApiError:
    name = shown(field)[1:-1]
    return ApiError(400, f"{name} is not a field that this server knows", param=name, code="unknown_parameter")


def _named(error: ValidationError, fields: dict[str, Any]) -> ApiError:
    """The first fault that pydantic found, as an error that names the field. For a value that may have one of several
    types, it has pydantic's message for each type."""
    first, *others = error.errors(include_url=False, include_context=False)
    if first["type"] in ("extra_forbidden", "missing"):
        name = shown(".".join(map(str, first["loc"])))[1:-1]
        if first["type"] == "missing":
            return ApiError(400, f"{name} is missing", param=name, code="missing_required_parameter")
        return _unknown(".".join(map(str, first["loc"])))
    place, found = _within(fields, first["loc"])
    reasons = [first["msg"], *(each["msg"] for each in others if _within(fields, each["loc"])[0] == place)]
    name = shown(place)[1:-1]
    message = f"{name} is {shown(found)}: {', or '.join(dict.fromkeys(reasons))}"
    return ApiError(400, message, param=name, code="invalid_value")


def _within(value: Any, place: Sequence[Any]) -> tuple[str, Any]:
    """The longest beginning of a place that leads to a value, and that value. If pydantic has tried several types, it
    adds the name of the type to the end of the place."""
    found = []
    for part in place:
        if not (isinstance(value, dict) and part in value) and not (isinstance(value, list) and type(part) is int):
            break
        value = value[part]
        found.append(str(part))
    return ".".join(found), value
