"""The torch reference of every op, by the op's name: the part of each contract that specifies it.

Rounding follows transformers' Qwen2 (modeling_qwen2.py), except where a value can stay in float32 longer for nothing.
float64 inputs are computed in float64 throughout: that is what the tests compare with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .dispatch import OPS


def __getattr__(name: str) -> Callable[..., Any]:
    if name not in OPS:
        raise AttributeError(f"there is no op {name!r}; expected one of {', '.join(OPS)}")
    return OPS[name].reference
