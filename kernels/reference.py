"""The torch reference of every op, under the op's name. A contract's reference defines the op's result.

References round where transformers' Qwen2 does (modeling_qwen2.py), except where keeping a value in float32 costs
nothing. float64 inputs are computed in float64 throughout; the tests compare with those results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .dispatch import OPS


def __getattr__(name: str) -> Callable[..., Any]:
    if name not in OPS:
        raise AttributeError(f"there is no op {name!r}; expected one of {', '.join(OPS)}")
    return OPS[name].reference
