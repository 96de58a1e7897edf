"""A Jinja sandbox that limits the time and the memory of every template.

A rendering has a budget of steps. Everything that a template can do costs steps: each time a node of the syntax tree is
reached, each character that is read or made, each item of a list. If a result can be larger than its inputs, its steps
are spent before it is made. Jinja has hooks for operators, calls, filters and tests. Other constructs (loop bodies,
macros, comparisons, `~`, slices, keys of dicts) are rewritten in the syntax tree to pass a hook. A template can call
only the filters, functions and methods listed here, because the cost of others is unknown. If Jinja makes a generator,
its items are computed at once, because a chain of 100,000 generators overflows the C stack.

A step takes at most 0.2 microseconds and 15 bytes, so the budget limits time and memory on every platform. Rendering in
a child process was rejected: starting one takes time, and an embedded interpreter has no executable to start.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import wraps
from types import BuiltinMethodType, MethodType
from typing import Any

from jinja2 import nodes
from jinja2.runtime import BlockReference, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEscapeFormatter, SandboxedFormatter
from jinja2.utils import Joiner, Namespace
from markupsafe import Markup

from .budget import CALL, ITEM, NEW_OBJECT, budget, drawn, length, listed, made, refuse, spend, walk
from .operators import OPERATORS, Rewriter, compare, concat, key, printed, sliced, spend_and, spend_filter
from .prices import FILTERS, LONG_TESTS, METHODS, deep, free, method_cost, priced

__all__ = ["LARGEST_TEMPLATE", "Sandbox", "budget"]

LARGEST_TEMPLATE = 200_000  # characters; templates of published models have up to 30,000
_LARGEST_COMPILED = 2_000_000  # names times blocks: Jinja copies all names for each block; so many take 0.7 seconds
_BLOCKS = (nodes.If, nodes.For, nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.With, nodes.Block)


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox with a budget. Compile and render within `budget`."""

    intercepted_binops = frozenset(OPERATORS)

    def __init__(self, functions: dict[str, Callable[..., Any]], filters: dict[str, Any], **options: Any) -> None:
        super().__init__(finalize=printed, **options)
        self.filters |= filters
        given: dict[str, Any] = self.filters  # jinja2 does not annotate the types of the functions in it
        tests: dict[str, Any] = self.tests
        self.filters = {name: priced(given[name], cost) for name, cost in FILTERS.items()}
        self.filters |= {"spend": spend_filter, "spend and": spend_and, "compare": compare, "key": key}
        self.filters |= {"~": concat, "slice made": sliced}
        self.tests = {name: priced(test, deep if name in LONG_TESTS else free) for name, test in tests.items()}
        del self.globals["lipsum"]
        self.globals |= functions
        self._functions = [*functions.values(), *self.globals.values()]

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        names = {node.name for node in tree.find_all(nodes.Name)}
        blocks = sum(1 for _ in tree.find_all(_BLOCKS))
        if len(names) * blocks > _LARGEST_COMPILED:
            refuse(f"it has {len(names)} names and {blocks} blocks, too many to compile")
        return Rewriter(self).visit(tree)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if type(left) is str and type(right) is str and operator == "+":
            spend(len(left) + len(right))
            return left + right
        if operator == "-":
            right = listed(right)
        OPERATORS[operator](left, right)
        result = self.binop_table[operator](left, right)
        return result if isinstance(result, (list, tuple)) else made(result)

    def getitem(self, obj: Any, argument: Any) -> Any:
        spend(ITEM)  # map('a.b.c') calls this three times for each item
        if isinstance(argument, (str, tuple)):
            walk(argument)  # a key is hashed, and compared with an equal key
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
            spend(len(text))
            return type(text)(formatter.vformat(text, args, named))

        format.is_priced = True  # type: ignore[attr-defined]  # a function may have attributes
        return format

    def call(self, context: Any, obj: Any, /, *args: Any, **named: Any) -> Any:
        spend(CALL + len(args) + len(named))
        owner = getattr(obj, "__self__", None)
        if isinstance(obj, (BuiltinMethodType, MethodType)) and owner is not None:
            if obj.__name__ not in METHODS.get(type(owner), ()):
                refuse(f"it calls {type(owner).__name__}.{obj.__name__}, which is not among what templates may call")
            args = tuple(map(listed, args))
            if isinstance(owner, str):
                if obj.__name__ == "join" and args:
                    spend(length(args[0]) * len(owner))
                method_cost(owner, obj.__name__, args, named)
            else:
                walk(args, named)
                if isinstance(owner, (list, tuple)):
                    walk(owner)
        elif not isinstance(obj, (Macro, LoopContext, BlockReference, Joiner, Undefined)):
            if not any(obj is function for function in self._functions) and not getattr(obj, "is_priced", False):
                refuse(f"it calls {getattr(obj, '__name__', obj)!r:.60}, which is not among what templates may call")
            spend(NEW_OBJECT)
            if obj in (dict, Namespace) and args and not isinstance(args[0], dict):
                args = ([drawn(iter(pair)) for pair in drawn(iter(args[0]))], *args[1:])  # keys are hashed
            walk(args)
            spend(ITEM * sum(map(length, (*args, *named.values()))))
        return made(super().call(context, obj, *args, **named))


class _Formatter(SandboxedFormatter):
    def format_field(self, value: Any, format_spec: str) -> str:
        if re.search(r"\d{4}", format_spec):
            refuse("it formats to a width or precision of 1,000 characters or more")
        walk(value, format_spec)
        return made(super().format_field(value, format_spec))

    def convert_field(self, value: Any, conversion: str | None) -> Any:
        walk(value)
        return super().convert_field(value, conversion)


class _EscapeFormatter(_Formatter, SandboxedEscapeFormatter):
    pass
