"""Deliberately broken copies of the kernels, to show that a test can fail."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from qwenkern import kernels

SOURCE = Path(kernels.__file__).parent


class Mutation(NamedTuple):
    """Replaces ``old`` by ``new`` in ``file`` of the kernels. Then ``test`` with these parameters must fail."""

    name: str
    file: str
    old: str
    new: str
    test: Callable[..., None]
    parameters: dict[str, Any]


def load(mutation: Mutation, folder: Path) -> ModuleType:
    """The kernels with one mutation, as a package of its own."""
    name = f"mutant_{abs(hash(mutation[:4]))}"
    copy = folder / name
    shutil.copytree(SOURCE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    text = (copy / mutation.file).read_text(encoding="utf-8")
    assert text.count(mutation.old) == 1, f"{mutation.old!r} stands {text.count(mutation.old)} times in {mutation.file}"
    (copy / mutation.file).write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, copy / "__init__.py", submodule_search_locations=[str(copy)])
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
