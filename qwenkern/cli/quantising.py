"""`qwenkern quantize IN OUT`: writes a checkpoint with quantised weights, which loads without any conversion."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint import Checkpoint
from ..checkpoint.own import write_checkpoint
from ..checkpoint.packing import slots
from ..config import Config
from ..conversion import CHOICES, Conversion, choose_conversion
from ..device import choose_dtype
from ..errors import RequestError
from ..kernels import Weight
from ..loading import find, tokenizer_of
from ..reading import read_json
from .as_folder import config_fields, small_files

Progress = Callable[[str, int, int], None]  # (task, bytes so far, all bytes)
_COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
_ROWS = 4096  # rows compared at a time: a multiple of 16, because quantised weights are stored in tiles of 16 rows


@dataclass
class Written:
    """The error of the quantised weights of a checkpoint, and its bytes before and after."""

    before: int = 0
    after: int = 0
    lost: float = 0.0  # the sum of the squared errors of the quantised values
    squares: float = 0.0  # the sum of the squares of the same values
    dense: list[str] = field(default_factory=list)  # the matrices that stayed dense
    twice: list[str] = field(default_factory=list)  # the formats of matrices that were quantised already

    @property
    def error(self) -> float:
        """The mean squared error, divided by the mean square of the values."""
        return self.lost / self.squares if self.squares else 0.0

    def compare(self, matrix: Tensor, weight: Weight) -> None:
        for start in range(0, len(matrix), _ROWS):
            stop = min(start + _ROWS, len(matrix))
            exact = matrix[start:stop].float()
            self.lost += float((weight.rows(start, stop).dequantise() - exact).square_().sum())
            self.squares += float(exact.square_().sum())


def quantise(model: str, out: Path, to: str, progress: Progress | None = None) -> Written:
    """Writes the checkpoint of a model, with its matrices quantised, to the new folder ``out``.

    Quantised matrices of a GGUF file are rounded again. Raises RequestError if ``out`` exists, or if the weights of a
    folder are quantised already; and as Model.from_pretrained does."""
    if to not in CHOICES:
        raise RequestError(f"--to is {to!r}; expected one of {', '.join(map(repr, CHOICES))}")
    if out.exists() or out.is_symlink():
        raise RequestError(f"{out}: exists; expected the name of a new folder")
    path, checkpoint = find(model, progress)
    is_gguf = bool(checkpoint.metadata)
    conversion = choose_conversion(to, None if is_gguf else checkpoint)
    tokenizer = tokenizer_of(checkpoint, path)  # raises if a file is missing
    written = Written(twice=sorted({weight.format for weight in checkpoint.formats.values()}))
    files: Mapping[str, Path | bytes] = {name: path / name for name in _COPIED if (path / name).is_file()}
    write_checkpoint(
        out,
        config_fields(checkpoint.config) if is_gguf else read_json(path / "config.json"),
        small_files(checkpoint, tokenizer) if is_gguf else files,
        in_order(_quantised(checkpoint, conversion, written, progress), checkpoint.config),
    )
    return written


def _quantised(
    checkpoint: Checkpoint, conversion: Conversion, written: Written, progress: Progress | None
) -> Iterator[tuple[str, Tensor | Weight]]:
    dtype = choose_dtype("auto", checkpoint.config, torch.device("cpu"))
    total = checkpoint.num_bytes(dtype)
    exact = torch.float32 if checkpoint.metadata else dtype  # a GGUF file has several dtypes
    for name, tensor in checkpoint.tensors(exact, dense=True):
        assert isinstance(tensor, Tensor)
        weight = conversion.quantised(name, tensor, torch.float32) if tensor.dim() == 2 else None
        stored = checkpoint.formats.get(name)
        written.before += tensor.numel() * dtype.itemsize if stored is None else stored.nbytes
        if weight is not None:
            written.compare(tensor, weight)
        elif tensor.dim() == 2:
            written.dense.append(name)
            tensor = tensor.to(dtype)
        written.after += tensor.nbytes if weight is None else weight.nbytes
        yield name, tensor if weight is None else weight
        if progress is not None:
            progress("quantize", written.before, total)


def in_order(tensors: Iterable[tuple[str, Tensor | Weight]], config: Config) -> Iterator[tuple[str, Tensor | Weight]]:
    """Yields the tensors of each layer in the order of the model, so that q, k and v are stored one after the other.
    Files have them layer by layer, in the order of their names."""
    places = {name: place for place, name in enumerate(slots(config))}
    layer, held = None, list[tuple[str, Tensor | Weight]]()
    for name, tensor in tensors:
        found = re.match(r"model\.layers\.\d+\.", name)
        if (found and found[0]) != layer:
            yield from sorted(held, key=lambda item: places.get(item[0], -1))
            layer, held = found and found[0], []
        held.append((name, tensor))
    yield from sorted(held, key=lambda item: places.get(item[0], -1))
