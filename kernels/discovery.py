"""Imports all files of a folder, so that each registers itself: a backend's ops, the formats of weights and of
pages."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterable
from typing import Any


def import_files(package: str, path: Iterable[str]) -> None:
    """Imports every file of a package. ``package`` is its ``__name__``, ``path`` its ``__path__``."""
    for found in pkgutil.iter_modules(path):
        importlib.import_module(f"{package}.{found.name}")


def register_format(
    cls: Any, base: type, formats: dict[str, Any], required: tuple[str, ...], triton: tuple[str, ...]
) -> None:
    """Registers a format under its name. Raises TypeError if the format has no name of its own, if it lacks a member in
    ``required``, or if it defines only some of the members in ``triton``."""
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
    """Whether a class overrides this member of its base. getattr binds class methods, which never compare equal."""
    return inspect.getattr_static(cls, name, None) is not inspect.getattr_static(base, name, None)
