"""A Jinja sandbox in which every template ends soon and stays small, whatever it says.

A rendering has a budget of steps. Everything that a template can do takes from it, before it is done where the result
can be larger than what it is made of: a node of the syntax tree, each time it is reached; a character that is read or
made; an item of a list. Jinja gives hooks for operators, calls, filters and tests. The rest (loop bodies, macros,
comparisons, `~`, slices, keys of dicts) is rewritten in the syntax tree, so that it passes one of them. What cannot be
weighed is refused: only the filters, functions and methods named here can be called. Where Jinja makes a generator, its
items are made at once: a chain of 100,000 generators overflows the C stack.

A step takes 0.2 microseconds and 15 bytes at most, so that the budget bounds time and memory on every platform. A child
process would cost its start, and would have to live where there is no executable to start (embedded interpreters).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from types import BuiltinMethodType, MethodType
from typing import Any, NoReturn

from jinja2 import nodes, pass_context, pass_eval_context
from jinja2.runtime import BlockReference, LoopContext, Macro, Undefined, markup_join, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEscapeFormatter, SandboxedFormatter, SecurityError
from jinja2.utils import Cycler, Joiner, Namespace
from jinja2.visitor import NodeTransformer
from markupsafe import Markup

STEPS = 20_000_000  # of any rendering
STEPS_PER_CHARACTER = 40  # and for each character of its input: templates copy a message several times
LARGEST_TEMPLATE = 200_000  # characters; those of published models have up to 30,000
_LARGEST_INT = 10_000  # bits
_LARGEST_COMPILED = 2_000_000  # names times blocks, for each of which Jinja copies all names: 0.7 seconds
_DEEPEST = 1000  # levels of nesting: below them, to hash a tuple would overflow the stack
_NODE, _ITEM, _CALL, _NEW_OBJECT = (
    3,
    8,
    30,
    64,
)  # steps of a node, of an item in a new list, of a call, of a new namespace

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


def _spend(steps: int) -> None:
    left = _left.get()
    left[0] -= steps
    if left[0] < 0:
        raise TooCostly("it takes more steps than any template for so long a conversation needs")


def _refuse(what: str) -> NoReturn:
    raise SecurityError(what)


def _walk(*values: Any) -> int:
    """Spends what it costs to read values to their depths, which it returns: shared parts count as often as they
    occur."""
    for depth in range(_DEEPEST):
        below: list[Any] = []
        for value in values:
            if isinstance(value, str):
                _spend(4 + len(value))
            elif isinstance(value, dict):
                _spend(4 + 8 * len(value))
                below += value.keys()
                below += value.values()
            elif isinstance(value, _CONTAINERS):
                _spend(4 + 4 * len(value))
                below += value
            elif type(value) is Namespace:
                below.append(value._Namespace__attrs)
            else:
                _spend(4)
        if not below:
            return depth
        values = below
    _refuse(f"it nests values {_DEEPEST} deep")


_CONTAINERS = (list, tuple, set, frozenset, range, type({}.keys()), type({}.values()), type({}.items()))


def _size(*values: Any) -> int:
    """The steps that `_walk` spends on them."""
    before = _left.get()[0]
    _walk(*values)
    return before - _left.get()[0]


def _len(value: Any) -> int:
    return len(value) if hasattr(type(value), "__len__") else 1


def _made(value: Any) -> Any:
    """Spends what a new value costs, without looking into it, and makes the items of an iterator."""
    if isinstance(value, str):
        _spend(len(value))
    elif isinstance(value, (list, tuple, dict, set)):
        _spend(_ITEM * len(value))
    elif isinstance(value, int):
        if value.bit_length() > _LARGEST_INT:
            _refuse(f"it makes a number of {value.bit_length()} bits")
    elif isinstance(value, (bytes, bytearray)):
        _refuse("it makes bytes")
    elif isinstance(value, Iterator):
        return iter(_drawn(value))
    return value


def _drawn(items: Iterator[Any]) -> list[Any]:
    drawn = []
    for item in items:
        _spend(_ITEM)
        drawn.append(item)
    return drawn


def _listed(value: Any) -> Any:
    """An iterator as a list, to know what is in it."""
    return _drawn(value) if isinstance(value, Iterator) else value


# Operators


def _times(left: Any, right: Any) -> None:
    for value, count in ((left, right), (right, left)):
        if isinstance(value, (str, list, tuple)) and isinstance(count, int):
            _spend(max(count, 0) * len(value))


def _power(base: Any, exponent: Any) -> None:
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * abs(exponent) > _LARGEST_INT:
        _refuse(f"it makes a number of more than {_LARGEST_INT} bits")


_WIDE = re.compile(r"[%)][#0\- +]*(?:\*|\d{4}|\d*\.(?:\*|\d{4}))")  # a width or precision of 1,000 or more


def _percent(pattern: Any, values: Any) -> None:
    if not isinstance(pattern, str):
        return
    if _WIDE.search(pattern):
        _refuse("it formats to a width or precision of 1,000 characters or more")
    size = _size(values)
    _spend(len(pattern) + pattern.count("%") * (1000 + size))


def _plus(left: Any, right: Any) -> None:
    _spend(_len(left) + _len(right))


def _minus(left: Any, right: Any) -> None:
    if not isinstance(left, (int, float)) or not isinstance(right, (int, float)):
        _walk(left, right)  # of the keys of a dict: hashes both


_OPERATORS = {"*": _times, "**": _power, "%": _percent, "+": _plus, "-": _minus}


@pass_context  # so that Jinja does not compute it when it compiles
def _spend_filter(_: Any, steps: int) -> int:
    _spend(steps)
    return steps


@pass_context
def _spend_and(_: Any, value: Any, steps: int) -> Any:
    _spend(steps)
    return value


def _compare(value: Any, *rest: Any) -> bool:
    """value op value op value ...: the operators of a comparison, as Python chains them."""
    for operator, other in zip(rest[::2], rest[1::2], strict=True):
        if operator in ("in", "notin"):
            other = _listed(other)
        if operator in ("in", "notin") and isinstance(other, str):
            _spend(_len(value) + len(other))
        elif operator in ("in", "notin") and isinstance(other, dict) and isinstance(value, str):
            _spend(1 + len(value))  # is compared with an equal key, if that is another object
        elif isinstance(value, str) and isinstance(other, str):
            _spend(1 + min(len(value), len(other)))
        elif hasattr(type(value), "__len__") or hasattr(type(other), "__len__"):
            _walk(value, other)
        if not _COMPARISONS[operator](value, other):
            return False
        value = other
    return True


_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "lteq": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "gteq": lambda a, b: a >= b,
    "in": lambda a, b: a in b,
    "notin": lambda a, b: a not in b,
}


@pass_eval_context
def _concat(context: Any, *values: Any) -> str:
    return _made((markup_join if context.autoescape else str_join)([_printed(value) for value in values]))


def _sliced(value: Any) -> Any:
    _spend(_len(value))
    return value


def _key(value: Any) -> Any:
    if not isinstance(value, str):
        _walk(value)
    return value


def _printed(value: Any) -> Any:
    """Of every `{{ }}`: what str() of it will cost."""
    if type(value) is str:
        _spend(len(value))
    else:
        _walk(value)
    return value


class _Rewriter(NodeTransformer):
    """Puts the costs into a template's syntax tree."""

    def __init__(self, environment: Any) -> None:
        self.environment = environment

    def _filter(self, name: str, node: nodes.Node | None, *arguments: nodes.Expr, at: nodes.Node) -> nodes.Filter:
        made = nodes.Filter(node, name, list(arguments), [], None, None)
        return made.set_lineno(at.lineno).set_environment(self.environment)

    def _with_cost(self, node: Any) -> Any:
        cost = nodes.Const(_weight(node))
        body = nodes.ExprStmt(self._filter("spend", cost, at=node))
        node.body.insert(0, body.set_lineno(node.lineno))
        return node

    def visit_For(self, node: nodes.For) -> nodes.For:
        if node.test is not None:
            node.test = self._filter("spend and", node.test, nodes.Const(_weight(node.test)), at=node)
        return self.generic_visit(self._with_cost(node))

    def visit_Macro(self, node: Any) -> Any:
        return self.generic_visit(self._with_cost(node))

    visit_CallBlock = visit_Block = visit_Template = visit_Macro

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return self._filter("~", node.nodes[0], *node.nodes[1:], at=node)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Filter:
        self.generic_visit(node)
        rest = [part for operand in node.ops for part in (nodes.Const(operand.op), operand.expr)]
        return self._filter("compare", node.expr, *rest, at=node)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return self._filter("slice made", node, at=node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Pair:
        self.generic_visit(node)
        if not isinstance(node.key, nodes.Const):
            node.key = self._filter("key", node.key, at=node)
        return node


def _weight(node: nodes.Node) -> int:
    """Steps of reaching a node and all below it once."""
    own = len(node.data) if isinstance(node, nodes.TemplateData) else _NODE
    if isinstance(node, (nodes.List, nodes.Tuple, nodes.Dict, nodes.Pair)):
        own = _ITEM
    return own + sum(map(_weight, node.iter_child_nodes()))


# Filters and tests


def _words(text: str) -> list[str]:
    return text.split()


def _free(*values: Any, **named: Any) -> None:
    pass


def _deep(*values: Any, **named: Any) -> None:
    _walk(*values, named)


def _of_json(
    value: Any, ensure_ascii: Any = False, indent: Any = None, separators: Any = None, *_: Any, **__: Any
) -> None:
    size = _size(value)
    if width := len(indent) if isinstance(indent, str) else max(_whole(indent), 0):
        _spend(size * width * (1 + _walk(value)))
    if separators is not None:
        _spend(size * _size(separators))


def _of_trim(value: Any, chars: Any = None) -> None:
    _walk(value, chars)
    if chars is not None:
        _spend(len(str(value)) * len(str(chars)))


def _of_format(pattern: Any, *values: Any, **named: Any) -> None:
    _walk(pattern)
    _percent(str(pattern), (values, named))


def _of_int(value: Any, *rest: Any, **named: Any) -> None:
    _walk(value, rest, named)
    _spend(_len(value) ** 2 // 100 if isinstance(value, str) else 0)  # Python before 3.10.7 reads any number of digits


def _of_sum(values: Any, *rest: Any, **named: Any) -> None:
    _walk(values, rest, named)
    if not (isinstance(values, (list, tuple, range)) and all(isinstance(value, (int, float)) for value in values)):
        _spend(_len(values) ** 2 * _ITEM)  # lists, added one after the other


def _of_indent(text: Any, width: Any = 4, *_: Any, **__: Any) -> None:
    _walk(text)
    size = len(width) if isinstance(width, str) else max(_whole(width), 0)
    _spend((str(text).count("\n") + 1) * size)


def _of_width(value: Any, width: Any = 80, *_: Any, **__: Any) -> None:
    _walk(value)
    _spend(max(_whole(width), 0))


def _of_replace(text: Any, old: Any, new: Any = "", *_: Any, **__: Any) -> None:
    _walk(text, old, new)
    _spend(str(text).count(str(old)) * len(str(new)))


def _of_join(values: Any, d: Any = "", *_: Any, **__: Any) -> None:
    _walk(values, d)
    _spend(_len(values) * len(str(d)))


def _of_round(value: Any, precision: Any = 0, *_: Any, **__: Any) -> None:
    _walk(value)
    if abs(_whole(precision)) > 1000:
        _refuse(f"it rounds to {precision} digits")


def _of_rows(values: Any, count: Any = 0, *_: Any, linecount: Any = 0, slices: Any = 0, **__: Any) -> None:
    _spend(_ITEM * (_len(values) + sum(max(_whole(number), 0) for number in (count, linecount, slices))))


def _of_choice(value: Any, *rest: Any, **named: Any) -> None:
    _spend(_ITEM * _len(value))  # what is dropped is read, too
    _walk(rest, named)


def _whole(value: Any) -> int:
    return value if isinstance(value, int) else 0


_FILTERS: dict[str, Callable[..., None]] = {  # what each costs before it runs; arguments are named as Jinja does
    **dict.fromkeys(_words("attr count d default first items last length list map reverse safe"), _free),
    **dict.fromkeys(_words("reject rejectattr select selectattr"), _of_choice),
    **dict.fromkeys(_words("abs capitalize dictsort e escape filesizeformat float forceescape groupby"), _deep),
    **dict.fromkeys(_words("lower max min random sort string title truncate unique upper"), _deep),
    **dict.fromkeys(_words("urlencode wordcount"), _deep),
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
_LONG_TESTS = {"in", "lower", "upper", *_words("== eq equalto != ne > gt greaterthan ge >= < lt lessthan <= le")}


def _priced(function: Callable[..., Any], cost: Callable[..., None]) -> Callable[..., Any]:
    first = 1 if getattr(function, "jinja_pass_arg", None) else 0  # the context, which Jinja puts first

    @wraps(function, updated=("__dict__",))
    def priced(*args: Any, **named: Any) -> Any:
        _spend(_CALL)
        values = list(args)
        for place, value in enumerate(values[first:], first):
            if function.__name__ in _READERS:
                values[place] = _listed(value)
        cost(*values[first:], **named)
        return _made(function(*values, **named))

    return priced


_READERS = set(_words("do_join do_sum sync_do_join sync_do_sum do_dictsort do_sort do_min do_max do_unique do_groupby"))
_READERS |= {"sync_do_groupby", "test_in"}


# Calls


def _method_cost(text: str, name: str, args: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Of a method of a string."""
    first = args[0] if args else None
    if name in _WIDENING:
        _spend(max(_whole(first if args else named.get("width", 0)), 0))
    elif name == "expandtabs":
        _spend(text.count("\t") * max(_whole(first if args else named.get("tabsize", 8)), 0))
    elif name == "replace" and len(args) > 1 and isinstance(first, str) and isinstance(args[1], str):
        _spend(text.count(first) * len(args[1]))
    elif name in _SEARCHING_BACKWARDS:
        needle = first if args else named.get("sep")
        _spend(len(text) * max(1, len(needle) if isinstance(needle, str) else 1))
    _spend(len(text))
    _walk(args, named)


_WIDENING = {"center", "ljust", "rjust", "zfill"}
_SEARCHING_BACKWARDS = {"rfind", "rindex", "rpartition", "rsplit", "strip", "lstrip", "rstrip"}  # n times m at worst
_METHODS: dict[type, set[str]] = {
    str: {name for name in dir(str) if name.startswith("is")}
    | _WIDENING
    | _SEARCHING_BACKWARDS
    | set(_words("capitalize casefold count endswith expandtabs find index join lower partition removeprefix"))
    | set(_words("removesuffix replace split splitlines startswith swapcase title upper")),
    dict: {"copy", "get", "items", "keys", "values"},
    list: {"copy", "count", "index"},
    tuple: {"count", "index"},
    float: {"is_integer"},
    type: {"fromkeys"},  # of dict
    LoopContext: {"cycle", "changed"},
    Cycler: {"next", "reset"},
}
_METHODS[Markup] = _METHODS[str]
_BLOCKS = (nodes.If, nodes.For, nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.With, nodes.Block)


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox under a budget. Compile and render in `budget`."""

    intercepted_binops = frozenset(_OPERATORS)

    def __init__(self, functions: dict[str, Callable[..., Any]], filters: dict[str, Any], **options: Any) -> None:
        super().__init__(finalize=_printed, **options)
        self.filters |= filters
        self.filters = {name: _priced(self.filters[name], cost) for name, cost in _FILTERS.items()}
        self.filters |= {"spend": _spend_filter, "spend and": _spend_and, "compare": _compare, "key": _key}
        self.filters |= {"~": _concat, "slice made": _sliced}
        self.tests = {name: _priced(test, _deep if name in _LONG_TESTS else _free) for name, test in self.tests.items()}
        del self.globals["lipsum"]
        self.globals |= functions
        self._functions = [*functions.values(), *self.globals.values()]

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        names = {node.name for node in tree.find_all(nodes.Name)}
        blocks = sum(1 for _ in tree.find_all(_BLOCKS))
        if len(names) * blocks > _LARGEST_COMPILED:
            _refuse(f"it has {len(names)} names and {blocks} blocks, too many to compile")
        return _Rewriter(self).visit(tree)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if type(left) is str and type(right) is str and operator == "+":
            _spend(len(left) + len(right))
            return left + right
        if operator == "-":
            right = _listed(right)
        _OPERATORS[operator](left, right)
        result = self.binop_table[operator](left, right)
        return result if isinstance(result, (list, tuple)) else _made(result)

    def getitem(self, obj: Any, argument: Any) -> Any:
        _spend(_ITEM)  # map('a.b.c') comes here three times for each item
        if isinstance(argument, (str, tuple)):
            _walk(argument)  # is hashed, and compared with an equal key
        return super().getitem(obj, argument)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if not isinstance(value, (MethodType, BuiltinMethodType)) or value.__name__ not in ("format", "format_map"):
            return None
        text = value.__self__
        if not isinstance(text, str):
            return None
        formatter = _EscapeFormatter(self, escape=text.escape) if isinstance(text, Markup) else _Formatter(self)

        @wraps(value)
        def format(*args: Any, **named: Any) -> str:
            if value.__name__ == "format_map":
                args, named = (), dict(*args, **named)
            _spend(len(text))
            return type(text)(formatter.vformat(text, args, named))

        format.is_priced = True
        return format

    def call(self, context: Any, obj: Any, /, *args: Any, **named: Any) -> Any:
        _spend(_CALL + len(args) + len(named))
        owner = getattr(obj, "__self__", None)
        if isinstance(obj, (BuiltinMethodType, MethodType)) and owner is not None:
            if obj.__name__ not in _METHODS.get(type(owner), ()):
                _refuse(f"it calls {type(owner).__name__}.{obj.__name__}, which is not among what templates may call")
            args = tuple(map(_listed, args))
            if isinstance(owner, str):
                if obj.__name__ == "join" and args:
                    _spend(_len(args[0]) * len(owner))
                _method_cost(owner, obj.__name__, args, named)
            else:
                _walk(args, named)
                if isinstance(owner, (list, tuple)):
                    _walk(owner)
        elif not isinstance(obj, (Macro, LoopContext, BlockReference, Joiner, Undefined)):
            if not any(obj is function for function in self._functions) and not getattr(obj, "is_priced", False):
                _refuse(f"it calls {getattr(obj, '__name__', obj)!r:.60}, which is not among what templates may call")
            _spend(_NEW_OBJECT)
            if obj in (dict, Namespace) and args and not isinstance(args[0], dict):
                args = ([_drawn(iter(pair)) for pair in _drawn(iter(args[0]))], *args[1:])  # keys are hashed
            _walk(args)
            _spend(_ITEM * sum(map(_len, (*args, *named.values()))))
        return _made(super().call(context, obj, *args, **named))


class _Formatter(SandboxedFormatter):
    def format_field(self, value: Any, format_spec: str) -> str:
        if re.search(r"\d{4}", format_spec):
            _refuse("it formats to a width or precision of 1,000 characters or more")
        _walk(value, format_spec)
        return _made(super().format_field(value, format_spec))

    def convert_field(self, value: Any, conversion: str | None) -> Any:
        _walk(value)
        return super().convert_field(value, conversion)


class _EscapeFormatter(_Formatter, SandboxedEscapeFormatter):
    pass
