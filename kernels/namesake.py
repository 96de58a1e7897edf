"""Makes `import kernels` find Hugging Face's library, even where Python finds this folder by that name first, as from
the root of a checkout. In this project the folder is the package qwenkern.kernels."""

from __future__ import annotations

import os
import sys
from importlib.util import module_from_spec
from types import ModuleType

NAME = "kernels"


def hand_over() -> None:
    """Loads Hugging Face's library under the name `kernels`. If the library is not installed, leaves an empty module
    without a file and a version, like the one that Python makes for a folder without __init__.py. transformers then
    takes the library for missing."""
    ours = sys.modules.pop(NAME)
    del sys.modules[__name__]
    elsewhere = [entry for entry in sys.path if not _is_here(os.path.join(entry or os.curdir, NAME))]
    found = (finder.find_spec(NAME, elsewhere) for finder in sys.meta_path)
    spec = next((spec for spec in found if spec is not None and spec.loader is not None), None)
    if spec is None or spec.loader is None:
        sys.modules[NAME] = _nothing(ours)
    else:
        sys.modules[NAME] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[NAME])


def _is_here(folder: str) -> bool:
    return os.path.realpath(folder) == os.path.dirname(os.path.realpath(__file__))


def _nothing(ours: ModuleType) -> ModuleType:
    empty = ModuleType(NAME)
    empty.__spec__, empty.__path__ = ours.__spec__, []

    def missing(name: str) -> None:
        raise AttributeError(
            f"module 'kernels' has no attribute {name!r}: the library of that name is not installed, and the folder of "
            "that name is the package qwenkern.kernels: write `from qwenkern import kernels`"
        )

    vars(empty)["__getattr__"] = missing
    return empty
