"""The steps that operators cost. Rewrites the syntax tree so that a hook runs for each operator."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from jinja2 import nodes, pass_context, pass_eval_context
from jinja2.runtime import markup_join, str_join
from jinja2.visitor import NodeTransformer

from .budget import ITEM, LARGEST_INT, NODE, length, listed, made, refuse, size_of, spend, walk


def _times(left: Any, right: Any) -> None:
    for value, count in ((left, right), (right, left)):
        if isinstance(value, (str, list, tuple)) and isinstance(count, int):
            spend(max(count, 0) * len(value))


def _power(base: Any, exponent: Any) -> None:
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * abs(exponent) > LARGEST_INT:
        refuse(f"it makes a number of more than {LARGEST_INT} bits")


_WIDE = re.compile(r"[%)][#0\- +]*(?:\*|\d{4}|\d*\.(?:\*|\d{4}))")  # a width or precision of 1,000 or more


def percent(pattern: Any, values: Any) -> None:
    if not isinstance(pattern, str):
        return
    if _WIDE.search(pattern):
        refuse("it formats to a width or precision of 1,000 characters or more")
    size = size_of(values)
    spend(len(pattern) + pattern.count("%") * (1000 + size))


def _plus(left: Any, right: Any) -> None:
    spend(length(left) + length(right))


def _minus(left: Any, right: Any) -> None:
    if not isinstance(left, (int, float)) or not isinstance(right, (int, float)):
        walk(left, right)  # the difference of two key views hashes both


OPERATORS = {"*": _times, "**": _power, "%": percent, "+": _plus, "-": _minus}


@pass_context  # with a context argument, Jinja does not evaluate the filter at compile time
def spend_filter(_: Any, steps: int) -> int:
    spend(steps)
    return steps


@pass_context
def spend_and(_: Any, value: Any, steps: int) -> Any:
    spend(steps)
    return value


def compare(value: Any, *rest: Any) -> bool:
    """value op value op value ...: a chain of comparisons with Python's meaning."""
    for operator, other in zip(rest[::2], rest[1::2], strict=True):
        if operator in ("in", "notin"):
            other = listed(other)
        if operator in ("in", "notin") and isinstance(other, str):
            spend(length(value) + len(other))
        elif operator in ("in", "notin") and isinstance(other, dict) and isinstance(value, str):
            spend(1 + len(value))  # the key is compared with an equal key if that is another object
        elif isinstance(value, str) and isinstance(other, str):
            spend(1 + min(len(value), len(other)))
        elif hasattr(type(value), "__len__") or hasattr(type(other), "__len__"):
            walk(value, other)
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
def concat(context: Any, *values: Any) -> str:
    return made((markup_join if context.autoescape else str_join)([printed(value) for value in values]))


def sliced(value: Any) -> Any:
    spend(length(value))
    return value


def key(value: Any) -> Any:
    if not isinstance(value, str):
        walk(value)
    return value


def printed(value: Any) -> Any:
    """Runs on the value of every `{{ }}` and spends the steps of str() of it."""
    if type(value) is str:
        spend(len(value))
    else:
        walk(value)
    return value


class Rewriter(NodeTransformer):
    """Inserts calls that spend steps into a template's syntax tree."""

    def __init__(self, environment: Any) -> None:
        self.environment = environment

    def _filter(self, name: str, node: nodes.Node | None, *arguments: nodes.Expr, at: nodes.Node) -> nodes.Filter:
        made = nodes.Filter(node, name, list(arguments), [], None, None)
        made.set_lineno(at.lineno).set_environment(self.environment)
        return made

    def _with_cost(self, node: Any) -> Any:
        cost = nodes.Const(_weight(node))
        body = nodes.ExprStmt(self._filter("spend", cost, at=node))
        node.body.insert(0, body.set_lineno(node.lineno))
        return node

    def visit_For(self, node: nodes.For) -> Any:
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
    """The steps of evaluating a node and all nodes below it once."""
    own = len(node.data) if isinstance(node, nodes.TemplateData) else NODE
    if isinstance(node, (nodes.List, nodes.Tuple, nodes.Dict, nodes.Pair)):
        own = ITEM
    return own + sum(map(_weight, node.iter_child_nodes()))
