"""Removes useless work from Triton's interpreter, so that the kernels' tests take half the time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter


def spare_useless_work() -> None:
    """For triton 3.7. Parts that another version lacks are left alone.

    A launch replaces the functions of ``triton.language`` by the interpreter's, and restores them at its end. Each call
    of a device function during the launch does so again, although nothing is left to replace. Each sum, difference and
    product of integers is also computed in int64 and compared with the bounds of its type, for an assertion that is
    off. This function removes both."""
    if hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = _unless_replaced(interpreter._patch_lang)
    options = interpreter.interpreter_builder.options
    if {"debug", "sanitize_overflow"} <= {field.name for field in fields(options)} and not options.debug:
        interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)


def round_products_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the interpreter compute tl.dot in float64 and round the result to float32. numpy's products add the rows at
    the edge of a tile in another order on some processors, so a row's bits would depend on its place in the tile."""
    create_dot = interpreter.InterpreterBuilder.create_dot

    def rounded(self: Any, a: Any, b: Any, d: Any, *how: Any) -> Any:
        if d.data.dtype != np.float32 or not (
            a.dtype.primitive_bitwidth > 8 and a.data.dtype.kind == b.data.dtype.kind == "f"
        ):
            return create_dot(self, a, b, d, *how)
        product = np.matmul(a.data, b.data, dtype=np.float64) + d.data
        return interpreter.TensorHandle(product.astype(np.float32), d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", rounded)


def _unless_replaced(patch: Callable[[Callable[..., Any]], Any]) -> Callable[[Callable[..., Any]], Any]:
    def wrapped(function: Callable[..., Any]) -> Any:
        languages = [each for each in function.__globals__.values() if each is tl or each is tl.core]
        if languages and not any(tl.core.is_builtin(each.load) for each in languages):
            return interpreter._LangPatchScope()  # with nothing to restore
        return patch(function)

    return wrapped
