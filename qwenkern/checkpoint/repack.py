"""Moves the blocks of a GGUF file to the layout of quantised weights (kernels/weights/grouped.py) without changing any
value: in C, or in torch if C cannot run."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from qwenkern.errors import CheckpointError
from qwenkern.kernels.c import build, threads
from qwenkern.kernels.c import repack as in_c
from qwenkern.kernels.weights import Grouped

from .blocks import read
from .dequantize import NOT_FINITE

_CHUNK = 1 << 19  # number of weights that torch moves at a time


class Task(NamedTuple):
    """The blocks of a weight [N, K], uint8, contiguous (a memory-mapped, read-only view is fine), and the weight that
    gets their values: of the format of ``kind``, on the CPU. name: of the tensor, for messages."""

    blocks: np.ndarray
    kind: GGMLQuantizationType
    weight: Grouped
    name: str

    def check(self) -> None:
        rows, columns = self.weight.shape
        values, size = GGML_QUANT_SIZES[self.kind]
        if self.blocks.dtype != np.uint8 or self.blocks.size * values != rows * columns * size:
            raise CheckpointError(
                f"{self.name}: {self.blocks.size} {self.blocks.dtype} of {self.kind.name} for a matrix "
                f"{[rows, columns]}; expected {rows * columns // values * size} uint8: {size} for each {values} values"
            )


def repack(tasks: Sequence[Task]) -> None:
    """Sets weights to the values of their blocks. Raises CheckpointError if the number of bytes does not fit the shape,
    or if a scale is not finite."""
    for task in tasks:
        task.check()
    if not tasks:
        return
    if build.prepare() is None:
        is_finite = in_c.repack([(_as_tensor(task.blocks), task.weight) for task in tasks])
    else:
        is_finite = [_in_torch(task.blocks.reshape(len(task.weight), -1), task.kind, task.weight) for task in tasks]
    for task, finite in zip(tasks, is_finite, strict=True):
        if not finite:
            raise CheckpointError(NOT_FINITE.format(name=task.name, kind=task.kind.name))


def _in_torch(blocks: np.ndarray, kind: GGMLQuantizationType, weight: Grouped) -> bool:
    rows, columns = weight.shape
    step = max(16, _CHUNK // columns // 16 * 16)
    with torch.no_grad(), threads.one_in_torch():
        for start in range(0, rows, step):
            some = blocks[start : start + step]
            parts = read(some.reshape(-1, GGML_QUANT_SIZES[kind][1]), kind)._asdict()
            by_row = {name: part.view(len(some), -1) for name, part in parts.items() if part is not None}
            made = weight.from_codes(by_row.pop("codes"), weight.dtype, **by_row)
            for to, value in zip(weight.rows(start, start + len(some)).tensors, made.tensors, strict=True):
                to.copy_(value)
    return weight.is_finite()


def _as_tensor(blocks: np.ndarray) -> torch.Tensor:
    """A tensor on the array's memory; the caller keeps the array. torch.from_numpy would warn of read-only memory, such
    as a mapped file."""
    return torch.frombuffer((ctypes.c_uint8 * blocks.nbytes).from_address(blocks.ctypes.data), dtype=torch.uint8)
