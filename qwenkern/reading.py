"""Reads the small files of a checkpoint as text or JSON, up to a limit, and the first bytes of large ones.

This file imports the standard library only."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from .errors import CheckpointError, Error

LARGEST = 1 << 24  # characters: about a hundred times the largest index, template or configuration of the family


def read_text(file: Path, error: type[Error] = CheckpointError) -> str:
    """The text of a UTF-8 file. Raises ``error`` if it cannot be read or is larger than LARGEST."""
    try:
        if os.path.exists(file) and not os.path.isfile(file):  # a read from a named pipe would wait for its writer
            raise error(f"{file}: expected a file, found something else of that name")
        with open(file, encoding="utf-8") as stream:
            text = stream.read(LARGEST + 1)
    except (OSError, UnicodeDecodeError) as fault:
        raise error(f"{file}: not readable as UTF-8 text: {fault}") from fault
    if len(text) > LARGEST:
        raise error(f"{file}: has {os.path.getsize(file)} bytes; expected at most {LARGEST} characters")
    return text


def read_json(file: Path, error: type[Error] = CheckpointError) -> dict[str, Any]:
    """The object in a JSON file; {} if there is no file. Raises ``error`` for anything else, and for a name that occurs
    twice in an object, because the right value is unknown."""
    if not os.path.lexists(file):
        return {}
    text = read_text(file, error)
    try:
        content = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as fault:
        raise error(f"{file}: not readable as JSON: {fault}") from fault
    if not isinstance(content, dict):
        raise error(f"{file}: holds a {type(content).__name__}; expected a JSON object")
    return content


def refuse_pointer(file: str | os.PathLike[str]) -> None:
    """Raises CheckpointError for a Git LFS pointer: the few lines of text that `git clone` writes in place of a large
    file if Git LFS is not installed."""
    with open(file, "rb") as stream:
        if stream.read(42) == b"version https://git-lfs.github.com/spec/v1":
            raise CheckpointError(f"{file}: is a Git LFS pointer; expected the file itself: run git lfs pull")


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether this is a file whose name ends in .gguf, in upper or lower case, or whose first four bytes are "GGUF"."""
    if not os.path.isfile(path):
        return False
    if os.fspath(path).lower().endswith(".gguf"):
        return True
    try:
        with open(path, "rb") as stream:
            return stream.read(4) == b"GGUF"
    except OSError:  # the caller who opens the file will raise the reason
        return False


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json.loads: the pairs of an object as a dict. Raises ValueError for a name that occurs twice."""
    content = dict(pairs)
    if len(content) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"{twice!r} occurs twice")
    return content
