"""The budget of steps of a rendering, and the steps that reading or making a value costs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NoReturn

from jinja2.sandbox import SecurityError
from jinja2.utils import Namespace

STEPS = 20_000_000  # for every rendering
STEPS_PER_CHARACTER = 40  # in addition, for each character of the input: templates copy a message several times
LARGEST_INT = 10_000  # bits
_DEEPEST = 1000  # levels of nesting; the hash of a more deeply nested tuple would overflow the stack
NODE, ITEM, CALL, NEW_OBJECT = 3, 8, 30, 64  # steps of a node, an item in a new list, a call, a new namespace

_left: ContextVar[list[int]] = ContextVar("steps left")


class TooCostly(SecurityError):
    """The template has used up its budget of steps."""


@contextmanager
def budget(num_characters: int = 0) -> Iterator[None]:
    """In this context, on this thread, all work shares one budget for an input of ``num_characters`` characters."""
    token = _left.set([STEPS + STEPS_PER_CHARACTER * num_characters])
    try:
        yield
    finally:
        _left.reset(token)


def spend(steps: int) -> None:
    """Takes steps from the budget. Raises TooCostly if none are left."""
    left = _left.get()
    left[0] -= steps
    if left[0] < 0:
        raise TooCostly("it takes more steps than any template for so long a conversation needs")


def refuse(what: str) -> NoReturn:
    """Raises SecurityError with this reason."""
    raise SecurityError(what)


def walk(*values: Any) -> int:
    """Spends the steps of reading values with everything nested in them. Returns the depth of the nesting. A part that
    occurs several times counts each time."""
    level: Iterable[Any] = values
    for depth in range(_DEEPEST):
        below: list[Any] = []
        for value in level:
            if isinstance(value, str):
                spend(4 + len(value))
            elif isinstance(value, dict):
                spend(4 + 8 * len(value))
                below += value.keys()
                below += value.values()
            elif isinstance(value, _CONTAINERS):
                spend(4 + 4 * len(value))
                below += value
            elif type(value) is Namespace:
                below.append(value._Namespace__attrs)
            else:
                spend(4)
        if not below:
            return depth
        level = below
    refuse(f"it nests values {_DEEPEST} deep")


_CONTAINERS: tuple[type[Any], ...]
_CONTAINERS = (list, tuple, set, frozenset, range, type({}.keys()), type({}.values()), type({}.items()))


def size_of(*values: Any) -> int:
    """The steps that `walk` would spend on the values."""
    before = _left.get()[0]
    walk(*values)
    return before - _left.get()[0]


def length(value: Any) -> int:
    """len(value), or 1 if the value has no length."""
    return len(value) if hasattr(type(value), "__len__") else 1


def made(value: Any) -> Any:
    """Spends the steps of a new value, without those of nested values. Computes all items of an iterator."""
    if isinstance(value, str):
        spend(len(value))
    elif isinstance(value, (list, tuple, dict, set)):
        spend(ITEM * len(value))
    elif isinstance(value, int):
        if value.bit_length() > LARGEST_INT:
            refuse(f"it makes a number of {value.bit_length()} bits")
    elif isinstance(value, (bytes, bytearray)):
        refuse("it makes bytes")
    elif isinstance(value, Iterator):
        return iter(drawn(value))
    return value


def drawn(items: Iterator[Any]) -> list[Any]:
    """The items of an iterator, computed at once."""
    drawn = []
    for item in items:
        spend(ITEM)
        drawn.append(item)
    return drawn


def listed(value: Any) -> Any:
    """An iterator as a list, so its items can be counted. Any other value unchanged."""
    return drawn(value) if isinstance(value, Iterator) else value


def whole(value: Any) -> int:
    """The argument if it is an int, else 0."""
    return value if isinstance(value, int) else 0
