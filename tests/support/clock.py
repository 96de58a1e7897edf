"""A clock that a test sets, for the modules that it tests."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest


class Clock:
    """Stands in for the module ``time``, with some functions replaced by the test's."""

    def __init__(self, **functions: Callable[[], float]) -> None:
        self.__dict__.update(functions)

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def set_clock(monkeypatch: pytest.MonkeyPatch, *modules: ModuleType, **functions: Callable[[], float]) -> None:
    """Replaces functions of ``time``, such as ``monotonic``, in some modules (by default, in all of the engine).

    A patch of the module ``time`` itself would reach the event loops of servers that other tests keep in threads. A
    loop that computes its next timer from both clocks sleeps for as long as they differ."""
    if not modules:
        modules = tuple(module for name, module in sys.modules.items() if name.startswith("qwenkern.engine"))
    for module in modules:
        if getattr(module, "time", None) is time:
            monkeypatch.setattr(module, "time", Clock(**functions))
