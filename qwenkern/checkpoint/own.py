"""Checkpoints that qwenkern writes: safetensors in the layout of kernels/weights/, which load without any conversion.

A quantised matrix is stored as <module>.<name> for each tensor of its format except ``like``. config.json has its
format in quantization_config.formats."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwenkern.errors import CheckpointError
from qwenkern.kernels import Weight
from qwenkern.kernels.weights import FORMATS, Dense, as_weight
from qwenkern.quantization_config import FIELDS, VERSION

from .integers import meta
from .mapped import DTYPES
from .parts import Read, Stored
from .shards import write_shards

LIKE = "like"  # an empty tensor with the dtype of the dequantised matrix, which the loading model chooses
PARTS = tuple({name for each in FORMATS.values() for name in each.names} - {LIKE, "weight"})
_FLOATS = {torch.int16: torch.float16, torch.int32: torch.float32}  # of scales and minima


def plan(stored: Stored, read: Read) -> Weight | None:
    """The weight of the matrix, on the meta device. Raises CheckpointError unless the matrix has the tensors of its
    format."""
    form = _format(stored)
    if found := sorted(stored.parts.keys() ^ set(_names(stored))):
        raise CheckpointError(
            f"{_file(stored)}: {stored.module} has the tensors {', '.join(sorted(stored.parts))}; expected "
            f"{', '.join(_names(stored))} of the format {form.format}: {found[0]} is wrong"
        )
    tensors = [
        meta(part.shape, DTYPES.get(part.dtype, torch.bool)) for part in map(stored.parts.__getitem__, _names(stored))
    ]
    weight: Weight = as_weight([*tensors, meta((0,), torch.float32)], form.format)
    try:
        weight.check(f"{_file(stored)}", stored.module, (stored.rows, stored.columns))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{error}; expected the format {form.format}, as the configuration says") from error
    return weight


def load(stored: Stored, read: Read, dtype: torch.dtype) -> Weight:
    """The matrix, with the tensors that ``read`` returns. Raises CheckpointError if a scale is not finite."""
    tensors = {name: read(name) for name in _names(stored)}
    for name in ("scales", "minima"):
        if name in tensors and not tensors[name].view(_FLOATS[tensors[name].dtype]).isfinite().all():
            raise stored.wrong(name, "has values that are NaN or infinite", "finite scales")
    weight: Weight = as_weight([*tensors.values(), torch.empty(0, dtype=dtype)], _format(stored).format)
    return weight


def write_checkpoint(
    out: Path,
    config: Mapping[str, Any],
    files: Mapping[str, Path | bytes],
    weights: Iterable[tuple[str, Tensor | Weight]],
) -> None:
    """Writes a checkpoint's folder. The folder gets its name only when it is complete.

    config: the fields of config.json; those on quantisation are replaced. files: further files by their names, such as
    tokenizer.json: a path to copy, or the content. weights: by Hugging Face's names, on the CPU; only a few are in
    memory at a time.
    Raises CheckpointError if the name exists, or if the folder cannot be written."""
    if os.path.lexists(out):
        raise CheckpointError(f"{out}: exists; expected the name of a new folder")
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name[:100]}.", dir=out.parent))
        try:
            _write(temporary, config, files, weights)
            os.chmod(temporary, 0o755)
            os.rename(temporary, out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)  # the incomplete folder after an error
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written: {error.strerror or error}") from error


def _write(
    folder: Path,
    config: Mapping[str, Any],
    files: Mapping[str, Path | bytes],
    weights: Iterable[tuple[str, Tensor | Weight]],
) -> None:
    formats: dict[str, str] = {}
    write_shards(folder, _tensors(weights, formats))
    fields = {name: value for name, value in config.items() if name not in FIELDS}
    if formats:
        fields["quantization_config"] = {"quant_method": "qwenkern", "version": VERSION, "formats": formats}
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    for name, content in files.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            shutil.copyfile(content, folder / name)


def _tensors(weights: Iterable[tuple[str, Tensor | Weight]], formats: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors with the names in the file. Adds the format of each matrix to ``formats``."""
    for name, weight in weights:
        if isinstance(weight, Dense):
            yield name, weight.tensor
        elif isinstance(weight, Weight):
            module = name.removesuffix(".weight")
            formats[module] = weight.format
            yield from ((f"{module}.{each}", tensor) for each, tensor in _stored(weight))
        else:
            yield name, weight


def _stored(weight: Weight) -> list[tuple[str, Tensor]]:
    return [(name, tensor) for name, tensor in zip(weight.names, weight.tensors, strict=True) if name != LIKE]


def _format(stored: Stored) -> type[Weight]:
    name = stored.quantization.formats.get(stored.module)
    if name not in FORMATS or LIKE not in FORMATS[name].names:
        known = ", ".join(name for name, form in FORMATS.items() if LIKE in form.names)
        raise CheckpointError(
            f"{_file(stored)}: {stored.module} is quantised, and the configuration gives it the format {name!r}; "
            f"expected one of {known}"
        )
    return FORMATS[name]


def _names(stored: Stored) -> list[str]:
    return [name for name in _format(stored).names if name != LIKE]


def _file(stored: Stored) -> str:
    return str(next(iter(stored.parts.values())).file)
