"""The interface of a checkpoint of any format: a configuration, and its weights one after another."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qwenkern.config import Config
from qwenkern.generation import Generation
from qwenkern.kernels import Weight


@dataclass(frozen=True)
class Checkpoint(ABC):
    """An opened checkpoint. Its header is read and checked; its weights are still on disk.

    generation: the end tokens, limits and sampling of generation_config.json and config.json, or of GGUF's key-values.
    metadata: GGUF's key-values, the vocabulary included; {} for safetensors.
    shapes: of the tensors that `tensors` yields, by Hugging Face's names.
    formats: for each quantised matrix, a weight of its format and size on the meta device.
    """

    path: Path
    config: Config
    generation: Generation
    metadata: Mapping[str, Any] = field(repr=False)
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)
    formats: Mapping[str, Weight] = field(repr=False, default_factory=dict, kw_only=True)

    @abstractmethod
    def tensors(self, dtype: torch.dtype, dense: bool = False) -> Iterator[tuple[str, torch.Tensor | Weight]]:
        """Yields each weight once, as `(name, tensor)` on the CPU, in the order of the file. A quantised matrix is a
        Weight, or with `dense` a tensor of its dequantised values.

        Weights stored as bfloat16, float16, float32 or GGML blocks are converted to `dtype`. Others keep their dtype,
        and `load_weights` refuses them. A tensor may be a view of the mapped file, so do not write to it."""

    def num_bytes(self, dtype: torch.dtype, dense: bool = False) -> int:
        """Bytes of all tensors that `tensors` yields. Dense ones have the dtype `dtype`."""
        formats = {} if dense else self.formats
        values = sum(math.prod(shape) for name, shape in self.shapes.items() if name not in formats)
        return values * dtype.itemsize + sum(weight.nbytes for weight in formats.values())
