"""What every format of checkpoint offers: a configuration, and one weight after another."""

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


@dataclass(frozen=True)
class Checkpoint(ABC):
    """An opened checkpoint: its header is read and checked, its weights are still on disk.

    generation: what generation_config.json and config.json, or GGUF's key-values, say of generating.
    metadata: GGUF's key-values, the vocabulary included; {} for safetensors.
    shapes: the tensors that `tensors` will give, under Hugging Face's names.
    """

    path: Path
    config: Config
    generation: Generation
    metadata: Mapping[str, Any] = field(repr=False)
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)

    @abstractmethod
    def tensors(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """Each weight once, as `(name, tensor)` on the CPU, in the order of the file.

        Weights that are stored as bfloat16, float16, float32 or GGML blocks come as `dtype`; anything else comes as it
        is stored, for `load_weights` to refuse. A tensor may be a view of the mapped file: do not write to it.
        """

    def num_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of all tensors in `dtype`: what `load_weights` counts up to in its calls of `progress`."""
        return sum(map(math.prod, self.shapes.values())) * dtype.itemsize
