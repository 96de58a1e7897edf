"""Files that register by being there: a backend's, and the formats of weights and of cache pages."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterable
from typing import Any


def import_files(package: str, path: Iterable[str]) -> None:
    """Imports every file of a package, which is given by its ``__name__`` and its ``__path__``."""
    for found in pkgutil.iter_modules(path):
        importlib.import_module(f"{package}.{found.name}")


def register_format(
    cls: Any, base: type, formats: dict[str, Any], required: tuple[str, ...], triton: tuple[str, ...]
) -> None:
    """Enters a format under its name. Raises TypeError unless it defines what is required, and all or nothing of what
    Triton's kernels ask for; or where it has no name of its own."""
    what = f"the format {cls.__name__} of {base.__name__}"
    if not isinstance(vars(cls).get("format"), str):
        raise TypeError(f"{what} does not define format; expected a name of its own")
    if missing := [name for name in required if not _defines(cls, base, name)]:
        raise TypeError(f"{what} does not define {', '.join(missing)}")
    missing = [name for name in triton if not _defines(cls, base, name)]
    if missing and len(missing) < len(triton):
        raise TypeError(f"{what} does not define {', '.join(missing)}; expected all of {', '.join(triton)} or none")
    if cls.format in formats:
        other = formats[cls.format]
        raise TypeError(f"{what} is called {cls.format!r}, as {other.__module__}.{other.__name__} is")
    formats[cls.format] = cls


def _defines(cls: type, base: type, name: str) -> bool:
    """Whether a class has something else than its base under this name: getattr would bind class methods anew."""
    return inspect.getattr_static(cls, name, None) is not inspect.getattr_static(base, name, None)
