"""The steps that a rendering may take, and what reading or making a value takes of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NoReturn

from jinja2.sandbox import SecurityError
from jinja2.utils import Namespace

STEPS = 20_000_000  # of any rendering
STEPS_PER_CHARACTER = 40  # and for each character of its input: templates copy a message several times
LARGEST_INT = 10_000  # bits
_DEEPEST = 1000  # levels of nesting: below them, to hash a tuple would overflow the stack
NODE, ITEM, CALL, NEW_OBJECT = 3, 8, 30, 64  # steps of a node, an item in a new list, a call, a new namespace

_left: ContextVar[list[int]] = ContextVar("steps left")


class TooCostly(SecurityError):
    """The template has used up its steps."""


@contextmanager
def budget(num_characters: int = 0) -> Iterator[None]:
    """What runs in this context, on this thread, shares one budget: for input of so many characters."""
    token = _left.set([STEPS + STEPS_PER_CHARACTER * num_characters])
    try:
        yield
    finally:
        _left.reset(token)


def spend(steps: int) -> None:
    """Takes steps from the budget. Raises TooCostly where there are none left."""
    left = _left.get()
    left[0] -= steps
    if left[0] < 0:
        raise TooCostly("it takes more steps than any template for so long a conversation needs")


def refuse(what: str) -> NoReturn:
    """Raises SecurityError."""
    raise SecurityError(what)


def walk(*values: Any) -> int:
    """Spends what it costs to read values to their depths, which it returns: shared parts count as often as they
    occur."""
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
    """The steps that `walk` spends on them."""
    before = _left.get()[0]
    walk(*values)
    return before - _left.get()[0]


def length(value: Any) -> int:
    """len() of what has one, else 1."""
    return len(value) if hasattr(type(value), "__len__") else 1


def made(value: Any) -> Any:
    """Spends what a new value costs, without looking into it, and makes the items of an iterator."""
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
    """The items of an iterator, which are made at once."""
    drawn = []
    for item in items:
        spend(ITEM)
        drawn.append(item)
    return drawn


def listed(value: Any) -> Any:
    """An iterator as a list, to know what is in it."""
    return drawn(value) if isinstance(value, Iterator) else value


def whole(value: Any) -> int:
    """An argument that should be a number of something, as a number."""
    return value if isinstance(value, int) else 0
