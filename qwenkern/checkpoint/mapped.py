"""Weight files mapped into memory. Their tensors are views, and adjacent tensors can be joined without a copy
(kernels/weights/stack.py)."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from qwenkern.errors import CheckpointError

from .parts import Part

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}  # safetensors' name -> torch's


class Mapped:
    """Reads tensors by their names. Each file is mapped once, when the first of its tensors is read. A tensor keeps its
    file mapped. Writing to a tensor does not change the file."""

    def __init__(self, parts: Mapping[str, Part]) -> None:
        self._parts = parts
        self._files: dict[Path, Tensor] = {}

    def __call__(self, name: str) -> Tensor:
        """Raises CheckpointError if the file was truncated after its header was read."""
        part = self._parts[name]
        if part.dtype not in DTYPES:
            raise CheckpointError(f"{part.file}: tensor {name} has dtype {part.dtype}; expected one of {list(DTYPES)}")
        dtype = DTYPES[part.dtype]
        end = part.start + math.prod(part.shape) * dtype.itemsize
        content = self._files.get(part.file)
        if content is None:
            content = self._files[part.file] = _map(part.file)
        if end > len(content):
            raise CheckpointError(f"{part.file}: has {len(content)} bytes; expected {end}, the end of tensor {name}")
        data = content[part.start : end]
        if part.start % dtype.itemsize:  # no writer does so
            data = data.clone()
        return data.view(dtype).view(part.shape)


def _map(file: Path) -> Tensor:
    """The bytes of a file. Changes of the tensor stay in this process. If the system can, it reads the file into huge
    pages, because a processor that streams weights prefetches further in a huge page."""
    try:
        with open(file, "rb") as stream:
            memory = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:  # ValueError: an empty file
        raise CheckpointError(f"{file}: cannot be mapped: {error}") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # an operating system without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
