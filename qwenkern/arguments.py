"""Checks of arguments, one function for each type. Each returns the value as a plain Python object, or raises
RequestError or the error class that its caller passes.

An integer is any object that Python accepts as an index, such as numpy's integers or an element of a tensor, except
True and False. A number is an integer or a real number, also of numpy, except NaN.
"""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any, Literal, overload

from .errors import Error, RequestError, shown


def is_whole(value: Any) -> bool:
    if type(value) is int or isinstance(value, bool) or not hasattr(type(value), "__index__"):
        return type(value) is int
    try:
        operator.index(value)
    except (TypeError, ValueError, RuntimeError):  # an array or a tensor with several elements
        return False
    return True


@overload
def whole(
    name: str,
    value: Any,
    low: int,
    high: int | None = None,
    optional: Literal[False] = False,
    exact: bool = False,
    error: type[Error] = RequestError,
) -> int: ...
@overload
def whole(
    name: str,
    value: Any,
    low: int,
    high: int | None = None,
    *,
    optional: bool,
    exact: bool = False,
    error: type[Error] = RequestError,
) -> int | None: ...
def whole(
    name: str,
    value: Any,
    low: int,
    high: int | None = None,
    optional: bool = False,
    exact: bool = False,
    error: type[Error] = RequestError,
) -> int | None:
    """An integer from low to high, or None if it is optional."""
    if value is None and optional:
        return None
    number = operator.index(value) if (type(value) is int if exact else is_whole(value)) else None
    if number is None or number < low or (high is not None and number > high):
        span = f"from {low} to {high}" if high is not None else f"of at least {low}"
        raise error(f"{name} is {shown(value)}; expected a whole number {span}" + " or None" * optional)
    return number


@overload
def number(
    name: str, value: Any, low: float, high: float, optional: Literal[False] = False, open_below: bool = False
) -> float: ...
@overload
def number(
    name: str, value: Any, low: float, high: float, *, optional: bool, open_below: bool = False
) -> float | None: ...
def number(
    name: str, value: Any, low: float, high: float, optional: bool = False, open_below: bool = False
) -> float | None:
    """A number from low to high (above low if ``open_below``), or None if it is optional."""
    if value is None and optional:
        return None
    found: Any = value if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan
    try:
        float(found)
    except (OverflowError, ValueError):  # more digits than a float holds
        found = math.nan
    if not low <= found <= high or (open_below and found == low):  # false for NaN
        span = f"{'above' if open_below else 'from'} {low} to {high}"
        raise RequestError(f"{name} is {shown(value)}; expected a number {span}" + " or None" * optional)
    return found if type(found) in (int, float) else float(found)


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise RequestError(f"{name} is {shown(value)}; expected True or False")
    return value
