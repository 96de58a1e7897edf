"""Opens Hugging Face folders: config.json and one or more *.safetensors, memory-mapped by the safetensors library.

The library checks a file's header: its length, and that the tensors fill the file without gaps or overlaps. This module
also refuses names that occur twice, an index that disagrees with its files, and paths that lead out of the folder.
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
from qwenkern.kernels import Weight
from qwenkern.reading import LARGEST, read_json, refuse_pointer, unique

from .adjacent import Adjacent
from .base import Checkpoint
from .links import inside
from .mapped import Mapped
from .parts import Part
from .quantised import Quantised, find

_INDEX = "model.safetensors.index.json"
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}  # dtype in safetensors -> in torch


@dataclass(frozen=True)
class SafetensorsCheckpoint(Checkpoint):
    """parts: all tensors, in the order of each file. quantised: the quantised matrices among them."""

    parts: Mapping[str, Part] = field(repr=False)
    quantised: Quantised = field(repr=False)

    def tensors(self, dtype: torch.dtype, dense: bool = False) -> Iterator[tuple[str, torch.Tensor | Weight]]:
        """See Checkpoint.tensors. Tensors stored as `dtype`, and the weights of qwenkern's own checkpoints, are views
        of the mapped file, not copies."""
        self.quantised.warn(self.path, dtype, dense)
        read = Mapped(self.parts)
        allocated = None if dense else Adjacent(self.formats, self.config, dtype)
        first = {f"{each.module}.{next(iter(each.parts))}": name for name, each in self.quantised.matrices.items()}
        for name in self.parts:
            if name in first:
                yield first[name], self.quantised.load(first[name], read, dtype, allocated)
            elif name in self.quantised.rest:
                tensor = read(name)
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
    for each, expected in files.items():
        found = headers[each].keys()
        if expected is not None and found != expected:
            where, name = min(
                [("the index", n) for n in expected - found] + [("the file", n) for n in found - expected]
            )
            raise CheckpointError(f"{each}: tensor {name} is in {where} only; {_INDEX} and the files must agree")
    config = Config.from_json(
        file, dtype=_stored_dtype(next(iter(headers.values())))
    )  # again, because the stored dtype is known now
    parts = {name: part for header in headers.values() for name, part in header.items()}
    quantised = find(parts, config, Mapped(parts))
    return SafetensorsCheckpoint(
        path=folder,
        config=config,
        generation=Generation.from_folder(folder, config.vocab_size),
        metadata={},
        shapes=quantised.shapes(),
        formats=quantised.plans,
        parts=parts,
        quantised=quantised,
    )


def _weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """The files to read, each with the names of its tensors in the index (None: there is no index)."""
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


def _header(file: Path) -> dict[str, Part]:
    """The tensors in the order of the data, checked by the library. Raises CheckpointError if a name occurs twice."""
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
        found = {
            name: Part(file, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
            for name, entry in entries.items()
        }
        return dict(sorted(found.items(), key=lambda item: item[1].start))


def _stored_dtype(parts: Mapping[str, Part]) -> str:
    """The dtype of a file's first floating-point weight by name: transformers uses it if config.json has no dtype."""
    stored = (parts[name].dtype for name in sorted(parts))
    return next((_NAMES[kind] for kind in stored if kind in _NAMES), "bfloat16")


@contextmanager
def _errors(file: Path) -> Iterator[None]:
    """Raises errors of reading `file` as CheckpointErrors that name it."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from error
