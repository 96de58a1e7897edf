"""The steps that filters, tests and methods cost. A template cannot call one that has no price here."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from jinja2.runtime import LoopContext
from jinja2.utils import Cycler
from markupsafe import Markup

from .budget import CALL, ITEM, length, listed, made, refuse, size_of, spend, walk, whole
from .operators import percent


def words(text: str) -> list[str]:
    return text.split()


def free(*values: Any, **named: Any) -> None:
    pass


def deep(*values: Any, **named: Any) -> None:
    walk(*values, named)


def _of_json(
    value: Any, ensure_ascii: Any = False, indent: Any = None, separators: Any = None, *_: Any, **__: Any
) -> None:
    size = size_of(value)
    if width := len(indent) if isinstance(indent, str) else max(whole(indent), 0):
        spend(size * width * (1 + walk(value)))
    if separators is not None:
        spend(size * size_of(separators))


def _of_trim(value: Any, chars: Any = None) -> None:
    walk(value, chars)
    if chars is not None:
        spend(len(str(value)) * len(str(chars)))


def _of_format(pattern: Any, *values: Any, **named: Any) -> None:
    walk(pattern)
    percent(str(pattern), (values, named))


def _of_int(value: Any, *rest: Any, **named: Any) -> None:
    walk(value, rest, named)
    spend(length(value) ** 2 // 100 if isinstance(value, str) else 0)  # before Python 3.10.7, digits are unlimited


def _of_sum(values: Any, *rest: Any, **named: Any) -> None:
    walk(values, rest, named)
    if not (isinstance(values, (list, tuple, range)) and all(isinstance(value, (int, float)) for value in values)):
        spend(length(values) ** 2 * ITEM)  # sum() of lists copies the result at each addition


def _of_indent(text: Any, width: Any = 4, *_: Any, **__: Any) -> None:
    walk(text)
    size = len(width) if isinstance(width, str) else max(whole(width), 0)
    spend((str(text).count("\n") + 1) * size)


def _of_width(value: Any, width: Any = 80, *_: Any, **__: Any) -> None:
    walk(value)
    spend(max(whole(width), 0))


def _of_replace(text: Any, old: Any, new: Any = "", *_: Any, **__: Any) -> None:
    walk(text, old, new)
    spend(str(text).count(str(old)) * len(str(new)))


def _of_join(values: Any, d: Any = "", *_: Any, **__: Any) -> None:
    walk(values, d)
    spend(length(values) * len(str(d)))


def _of_round(value: Any, precision: Any = 0, *_: Any, **__: Any) -> None:
    walk(value)
    if abs(whole(precision)) > 1000:
        refuse(f"it rounds to {precision} digits")


def _of_rows(values: Any, count: Any = 0, *_: Any, linecount: Any = 0, slices: Any = 0, **__: Any) -> None:
    spend(ITEM * (length(values) + sum(max(whole(number), 0) for number in (count, linecount, slices))))


def _of_choice(value: Any, *rest: Any, **named: Any) -> None:
    spend(ITEM * length(value))  # the dropped items are read too
    walk(rest, named)


FILTERS: dict[str, Callable[..., None]] = {  # the cost of each, spent before it runs; arguments have Jinja's names
    **dict.fromkeys(words("attr count d default first items last length list map reverse safe"), free),
    **dict.fromkeys(words("reject rejectattr select selectattr"), _of_choice),
    **dict.fromkeys(words("abs capitalize dictsort e escape filesizeformat float forceescape groupby"), deep),
    **dict.fromkeys(words("lower max min random sort string title truncate unique upper"), deep),
    **dict.fromkeys(words("urlencode wordcount"), deep),
    "batch": _of_rows,
    "slice": _of_rows,
    "center": _of_width,
    "format": _of_format,
    "indent": _of_indent,
    "int": _of_int,
    "join": _of_join,
    "replace": _of_replace,
    "round": _of_round,
    "sum": _of_sum,
    "tojson": _of_json,
    "trim": _of_trim,
}
LONG_TESTS = {"in", "lower", "upper", *words("== eq equalto != ne > gt greaterthan ge >= < lt lessthan <= le")}


def priced(function: Callable[..., Any], cost: Callable[..., None]) -> Callable[..., Any]:
    first = 1 if getattr(function, "jinja_pass_arg", None) else 0  # Jinja passes the context first

    @wraps(function, updated=("__dict__",))
    def with_price(*args: Any, **named: Any) -> Any:
        spend(CALL)
        values = list(args)
        for place, value in enumerate(values[first:], first):
            if function.__name__ in _READERS:
                values[place] = listed(value)
        cost(*values[first:], **named)
        return made(function(*values, **named))

    return with_price


_READERS = set(words("do_join do_sum sync_do_join sync_do_sum do_dictsort do_sort do_min do_max do_unique do_groupby"))
_READERS |= {"sync_do_groupby", "test_in"}


def method_cost(text: str, name: str, args: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Spends the steps of a call of a string's method."""
    first = args[0] if args else None
    if name in _WIDENING:
        spend(max(whole(first if args else named.get("width", 0)), 0))
    elif name == "expandtabs":
        spend(text.count("\t") * max(whole(first if args else named.get("tabsize", 8)), 0))
    elif name == "replace" and len(args) > 1 and isinstance(first, str) and isinstance(args[1], str):
        spend(text.count(first) * len(args[1]))
    elif name in _SEARCHING_BACKWARDS:
        needle = first if args else named.get("sep")
        spend(len(text) * max(1, len(needle) if isinstance(needle, str) else 1))
    spend(len(text))
    walk(args, named)


_WIDENING = {"center", "ljust", "rjust", "zfill"}
_SEARCHING_BACKWARDS = {"rfind", "rindex", "rpartition", "rsplit", "strip", "lstrip", "rstrip"}  # n * m at worst
METHODS: dict[type, set[str]] = {
    str: {name for name in dir(str) if name.startswith("is")}
    | _WIDENING
    | _SEARCHING_BACKWARDS
    | set(words("capitalize casefold count endswith expandtabs find index join lower partition removeprefix"))
    | set(words("removesuffix replace split splitlines startswith swapcase title upper")),
    dict: {"copy", "get", "items", "keys", "values"},
    list: {"copy", "count", "index"},
    tuple: {"count", "index"},
    float: {"is_integer"},
    type: {"fromkeys"},  # of dict
    LoopContext: {"cycle", "changed"},
    Cycler: {"next", "reset"},
}
METHODS[Markup] = METHODS[str]
