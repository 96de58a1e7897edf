"""Resolves the value of ``--model`` to a path on this machine.

    a folder, or a GGUF file                                   itself
    demo, qwen2.5-coder-0.5b-instruct                          one GGUF file, downloaded once into our cache (demo.py)
    qwen2.5-3b-instruct, Qwen/Qwen2.5-3B, somebody/finetune    a snapshot of the hub, in the hub's own cache

A path that exists takes precedence over a name, with one exception: a folder that has the name of a known model but
holds no checkpoint is ignored. So a folder ``demo/`` without a checkpoint does not hide the model ``demo``.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from ..errors import CheckpointError, RequestError, shown
from ..reading import is_gguf
from .demo import DEMO, LICENCE
from .download import Download, Progress, fetch
from .huggingface import Accept, snapshot

DOWNLOADS: dict[str, Download] = {"demo": DEMO, "qwen2.5-coder-0.5b-instruct": DEMO}
_APACHE, _RESEARCH, _QWEN = "Apache-2.0", "Qwen Research License (non-commercial)", "Qwen License"


def _family() -> Iterator[tuple[str, str]]:
    """(hub id, licence) of every dense Qwen2.5 model."""
    for branch, sizes in (
        ("", "0.5B 1.5B 3B 7B 14B 32B 72B"),
        ("Coder-", "0.5B 1.5B 3B 7B 14B 32B"),
        ("Math-", "1.5B 7B 72B"),
    ):
        for size in sizes.split():
            licence = {"3B": _RESEARCH, "72B": _QWEN}.get(size, _APACHE)
            yield from ((f"Qwen/Qwen2.5-{branch}{size}{variant}", licence) for variant in ("", "-Instruct"))


_HUB = {hub_id.lower().removeprefix("qwen/"): (hub_id, licence) for hub_id, licence in _family()}
_QUANTISED = ("AWQ", "GPTQ-Int4", "GPTQ-Int8")  # variants of most of the models on the hub


def licence(model: str) -> str | None:
    """The licence of a known model name. None for a path and for any other name."""
    if _local(model):
        return None
    key = model.lower()
    return LICENCE if key in DOWNLOADS else (_published(key) or (None, None))[1]


def _published(key: str) -> tuple[str, str] | None:
    """(hub id, licence) of a model that Qwen published, or of a quantised variant of one, by its name in lower case."""
    key = key.removeprefix("qwen/")
    for variant in _QUANTISED:
        base = _HUB.get(key.removesuffix(f"-{variant.lower()}"))
        if base and key.endswith(f"-instruct-{variant.lower()}"):
            return f"{base[0]}-{variant}", base[1]
    return _HUB.get(key)


def resolve(model: str | Path, progress: Progress | None = None, accept: Accept | None = None) -> Path:
    """The local path of a model. A path is returned as it is; a named model is downloaded unless it is cached. Raises
    RequestError or CheckpointError."""
    if not isinstance(model, (str, Path)):
        raise RequestError(f"model is of type {type(model).__name__}; expected a path, a name or a hub id")
    if path := _local(model):
        return path
    text = str(model)
    if not text.strip():
        raise RequestError(f"model: found {shown(text)}, expected a folder, a .gguf file, a name or a hub id")
    if os.path.isfile(_expanded(text)) and text.lower() not in _names():
        raise CheckpointError(f"{text}: found a file of another kind, expected a folder or a GGUF file")
    path_like = text.startswith((".", "/", "~")) or text.lower().endswith(".gguf") or text.count("/") > 1
    if isinstance(model, Path) or path_like or os.path.isabs(text) or "\\" in text:
        raise CheckpointError(f"{text}: no such file or folder; expected a checkpoint's folder or a .gguf file")
    return pull(text, progress, accept)


def pull(name: str, progress: Progress | None = None, accept: Accept | None = None) -> Path:
    """Downloads a model by its name or hub id, unless it is cached, and returns its path.

    progress: called during the download of one of DOWNLOADS, with the origin's name, the bytes downloaded and the bytes
    in all. huggingface_hub shows its own progress bars.
    accept: called with the configuration of a hub model before its weights are downloaded. It may raise.
    """
    key = name.lower()
    if key in DOWNLOADS:
        return fetch(DOWNLOADS[key], progress)
    if known := _published(key):
        return snapshot(known[0], accept)
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        return snapshot(name, accept)
    close = difflib.get_close_matches(key.removeprefix("qwen/"), _names(), n=4, cutoff=0.6)
    hint = f"did you mean {', '.join(close)}?" if close else "known names: demo, qwen2.5-3b-instruct and the like"
    raise RequestError(
        f"model: found the unknown name {shown(name)}, expected a path, a hub id or a known name; {hint}"
    )


def _names() -> list[str]:
    return list(dict.fromkeys((*DOWNLOADS, *_HUB)))


def _local(model: str | Path) -> Path | None:
    """The path of the folder or GGUF file that ``model`` names on this machine, or None."""
    path = _expanded(model)  # os.path returns False where pathlib raises (a long text, a NUL)
    if os.path.isfile(path):
        return Path(path) if is_gguf(path) else None
    if not os.path.isdir(path):
        return None
    if isinstance(model, str) and model.lower() in _names():
        holds_model = any(file == "config.json" or file.endswith(".gguf") for file in os.listdir(path))
        return Path(path) if holds_model else None
    return Path(path)


def _expanded(model: str | Path) -> str:
    try:
        return os.path.expanduser(model)
    except ValueError:  # the text after "~" cannot be a user's name
        return str(model)
