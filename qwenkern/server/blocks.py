"""Reads values of a body whose model depends on their `type`: parts of messages, items of a conversation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from ..errors import shown
from . import bodies
from .bodies import Body
from .errors import ApiError


def read(kinds: Mapping[str, type[Body]], value: Any, place: str, default: str | None = None) -> Any:
    """The value, parsed by the model of its type. default: the type of a value without one. Raises ApiError, which
    names the place."""
    if not isinstance(value, dict):
        raise wrong(f"{place} is {shown(value)}; expected an object with a type", place)
    kind = value.get("type", default)
    if not isinstance(kind, str) or kind not in kinds:
        raise wrong(f"{place}.type is {shown(kind)}; expected {' or '.join(map(repr, kinds))}", f"{place}.type")
    try:
        return kinds[kind].model_validate(value)
    except ValidationError as error:
        told = bodies._named(error, value)
        param = f"{place}.{told.param}" if told.param else place
        raise ApiError(400, f"{place}.{told.message}", param=param, code=told.code) from None


def wrong(message: str, param: str) -> ApiError:
    return ApiError(400, message, param=param, code="invalid_value")
