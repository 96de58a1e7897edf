"""Breaks the kernels by each file's MUTATIONS. The test named with a mutation must fail."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support import mutations as mutants

FILES = sorted(
    file
    for file in Path(__file__).parents[1].rglob("test_*.py")
    if re.search(r"^from support\.mutations import\b", file.read_text("utf-8"), re.MULTILINE)
)
PASSED: set[tuple[Callable[..., None], str]] = set()  # tests and parameters, on the kernels as they are


def mutations() -> Iterator[Any]:
    """All mutations. Those of one file run in one process, because they share the tests that must fail."""
    for file in FILES:
        for mutation in _module(file).MUTATIONS:
            name = f"{mutation.file}: {mutation.name}"
            yield pytest.param(mutation, id=name, marks=pytest.mark.xdist_group(f"mutations of {file.stem}"))


def _module(file: Path) -> ModuleType:
    """The module of a file, under a name of its own: a package `kernels` would be taken for the library."""
    spec = importlib.util.spec_from_file_location(f"mutations_of_{file.stem}", file)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, Triton compiles and its interpreter is off")
@pytest.mark.parametrize("mutation", list(mutations()))
def test_a_broken_kernel_is_noticed(mutation, ops, tmp_path):
    whole = mutation.test, repr(mutation.parameters)
    if whole not in PASSED:
        mutation.test(ops, torch.device("cpu"), **mutation.parameters)
        PASSED.add(whole)
    mutant = mutants.load(mutation, tmp_path)
    try:
        with pytest.raises(AssertionError):
            mutation.test(mutant, torch.device("cpu"), **mutation.parameters)
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == mutant.__name__]:
            del sys.modules[name]
