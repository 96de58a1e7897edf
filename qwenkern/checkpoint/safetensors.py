"""Opens Hugging Face folders: config.json and one or more *.safetensors, memory-mapped by the safetensors library.

The library checks a file's header: its length, and that the tensors fill the file without gaps or overlaps. This file
also refuses names that occur twice, an index that disagrees with its files, and names that lead out of the folder.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from qwenkern.config import Config
from qwenkern.errors import CheckpointError, shown
from qwenkern.generation import Generation
from qwenkern.reading import LARGEST, read_json, refuse_pointer, unique

from .base import Checkpoint
from .links import inside

_INDEX = "model.safetensors.index.json"
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_DTYPES = {
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
}  # the format's name -> torch's name


@dataclass(frozen=True)
class SafetensorsCheckpoint(Checkpoint):
    """files: the tensor names of each file, in the file's order."""

    files: Mapping[Path, tuple[str, ...]] = field(repr=False)

    def tensors(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """See Checkpoint.tensors. Tensors stored as `dtype` are views of the mapped file, not copies."""
        for file, names in self.files.items():
            with _errors(file), safe_open(file, framework="pt") as opened:
                for name in names:
                    tensor = opened.get_tensor(name)
                    yield name, tensor.to(dtype) if tensor.dtype in _FLOATS else tensor


def open_safetensors(folder: Path) -> SafetensorsCheckpoint:
    """Reads config.json, generation_config.json, the index and the header of every file. Raises CheckpointError."""
    file = folder / "config.json"
    config = (
        Config.from_json(file) if file.exists() else None
    )  # first, because it may say that the weights are quantised
    files = _weight_files(folder)
    if config is None:
        raise CheckpointError(f"{folder}: has weights but no config.json")
    headers = {file: _header(file) for file in files}
    for file, expected in files.items():
        found = headers[file].keys()
        if expected is not None and found != expected:
            where, name = min(
                [("the index", n) for n in expected - found] + [("the file", n) for n in found - expected]
            )
            raise CheckpointError(f"{file}: tensor {name} is in {where} only; {_INDEX} and the files must agree")
    config = Config.from_json(
        folder / "config.json", dtype=_stored_dtype(next(iter(files)))
    )  # again, because the stored dtype is known now
    return SafetensorsCheckpoint(
        path=folder,
        config=config,
        generation=Generation.from_folder(folder, config.vocab_size),
        metadata={},
        shapes={name: shape for header in headers.values() for name, shape in header.items()},
        files={file: tuple(header) for file, header in headers.items()},
    )


def _weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """The files to read, each with its tensors by the index (None: there is no index)."""
    if (folder / _INDEX).is_file():
        files = _indexed_files(folder)
        if (stray := folder / "model.safetensors").exists() and stray not in files:
            raise CheckpointError(
                f"{folder}: has {stray.name} and an {_INDEX} without it; expected one of the two: remove the stale one"
            )
        return files
    found = sorted(folder.glob("*.safetensors"))
    single = [file for file in found if file.name == "model.safetensors"] or found
    if len(single) == 1:
        return {inside(folder, single[0].name, "the folder"): None}
    if found:
        raise CheckpointError(
            f"{folder}: has {len(found)} .safetensors files and no {_INDEX}; expected one, or a single file"
        )
    if ggufs := sorted(folder.glob("*.gguf")):
        raise CheckpointError(
            f"{folder}: has no .safetensors files; expected them, or the path of a GGUF file: {ggufs[0]}"
        )
    if pickles := sorted(file.name for kind in ("*.bin", "*.pt", "*.pth") for file in folder.glob(kind)):
        raise CheckpointError(
            f"{folder}: has no .safetensors files, only pickle files ({pickles[0]}), which qwenkern never opens; "
            "convert them to safetensors"
        )
    raise CheckpointError(f"{folder}: has no .safetensors files")


def _indexed_files(folder: Path) -> dict[Path, set[str] | None]:
    index = folder / _INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index}: expected an object weight_map from tensors to files, found {shown(weight_map, 100)}"
        )
    files: dict[Path, set[str]] = {}
    paths: dict[str, Path] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not name.endswith(".safetensors") or any(c in name for c in "/\\:\0"):
            raise CheckpointError(
                f"{index}: tensor {tensor} is in {shown(name)}; expected the bare name of a .safetensors file"
            )
        if name not in paths:
            paths[name] = inside(folder, name, _INDEX)
        files.setdefault(paths[name], set()).add(tensor)
    return dict(sorted(files.items()))


def _header(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the order of the data, checked by the library. Raises if a name occurs twice."""
    with _errors(file):
        refuse_pointer(file)
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > LARGEST:
                raise ValueError(f"its header has {length} bytes; expected at most {LARGEST}")
            text = stream.read(length)
        with safe_open(file, framework="pt"):
            pass
        entries = json.loads(text, object_pairs_hook=unique)
        entries.pop("__metadata__", None)
        ordered = sorted(entries, key=lambda name: entries[name]["data_offsets"])
        return {name: tuple(entries[name]["shape"]) for name in ordered}


def _stored_dtype(file: Path) -> str:
    """The dtype of a file's first floating-point weight. transformers uses it if config.json names none."""
    with _errors(file), safe_open(file, framework="pt") as opened:
        stored = (opened.get_slice(name).get_dtype() for name in opened.keys())  # noqa: SIM118  (it is no mapping)
        return next((_DTYPES[kind] for kind in stored if kind in _DTYPES), "bfloat16")


@contextmanager
def _errors(file: Path) -> Iterator[None]:
    """Raises errors of reading `file` as CheckpointErrors that name it."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from error
