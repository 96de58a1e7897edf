"""The ops that C implements. Each is registered with the backend in the file named like its contract."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import c
from ..discovery import import_files
from .backend import C

import_files(c.__name__, c.__path__)


def __getattr__(name: str) -> Callable[..., Any]:
    if name not in C.implementations:
        raise AttributeError(f"C implements no op {name!r}; expected one of {', '.join(C.implementations)}")
    return C.implementations[name].run
