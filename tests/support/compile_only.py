"""A pytest plugin: the kernels' tests only compile the kernels that they launch on a GPU (benchmarks/carry.py)."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from support import references, tolerances

from qwenkern.benchmarks.offline.carried import compiling
from qwenkern.benchmarks.offline.machine_code import DEVICES


def pytest_configure(config: pytest.Config) -> None:
    stack = contextlib.ExitStack()
    folder = Path(os.environ["COMPILE_ONLY_INTO"])
    stack.enter_context(compiling(DEVICES[os.environ["COMPILE_ONLY_FOR"]], (False,), folder))
    config.add_cleanup(stack.close)
    # The tests have already imported these functions by name, so their code is replaced.
    references.assert_matches_reference.__code__ = _launches_only.__code__
    for name in ("assert_as_close_as", "assert_nearly_equal", "assert_roughly_equal"):
        getattr(tolerances, name).__code__ = _passes.__code__
    torch.equal = _passes


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = [item for item in items if "device" in getattr(item, "fixturenames", ())]


def _passes(*args: Any, **keywords: Any) -> bool:
    return True


def _launches_only(ops: Any, name: str, *args: Any, changed: Any = (), padding: int = 0, **keywords: Any) -> Any:
    """The new code of assert_matches_reference, whose global names it uses: runs the op on guarded copies of its
    arguments."""
    mine = [mapped(lambda each: guard(each, padding if each.dim() > 1 else 0), arg) for arg in args]  # noqa: F821
    return getattr(ops, name)(*(own(ops, arg) for arg in mine), **keywords)  # noqa: F821
