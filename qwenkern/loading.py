"""Loads a model by its name: its module, tokenizer and generation settings."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from .checkpoint import Checkpoint, load_weights, open_checkpoint
from .device import choose_dtype
from .errors import RequestError, shown
from .generation import Generation
from .hub.names import resolve
from .kernels import prepare
from .quantise import choose_quantisation
from .qwen2 import Qwen2
from .text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]  # (task, bytes so far, all bytes)


class Loaded(NamedTuple):
    """The parts of a loaded checkpoint."""

    module: Qwen2
    tokenizer: Tokenizer
    generation: Generation


def load(
    model: str | Path,
    device: torch.device,
    dtype: str | torch.dtype,
    progress: Progress | None,
    quantize: str | None = None,
) -> Loaded:
    """Loads the model, and downloads it first if it is not on this machine. Raises as Model.from_pretrained does."""
    if progress is not None and not callable(progress):
        raise RequestError(f"progress is {shown(progress)}; expected a function or None")
    path, checkpoint = find(model, progress)
    started = time.perf_counter()
    quantisation = choose_quantisation(quantize, checkpoint)
    dtype = choose_dtype(dtype, checkpoint.config, device, quantisation.is_quantised)
    prepare(device, dtype)
    tokenizer = tokenizer_of(checkpoint, path)
    module = Qwen2(checkpoint.config, dtype, device, allocated=False)
    total = checkpoint.num_bytes(dtype) if progress else 0
    load_weights(
        module,
        checkpoint.config,
        quantisation.of(checkpoint.tensors(dtype), dtype),
        source=str(path),
        progress=progress and (lambda done: progress("load", done, total)),
    )
    logger.info("loaded %s as %s on %s in %.1f s", path, dtype, device, time.perf_counter() - started)
    return Loaded(module, tokenizer, checkpoint.generation)


def find(model: str | Path, progress: Progress | None = None) -> tuple[Path, Checkpoint]:
    """The path of a model, which is downloaded if necessary, and its checkpoint, without reading a weight."""
    path = resolve(model, progress and (lambda origin, done, total: progress(f"download from {origin}", done, total)))
    return path, open_checkpoint(path)


def tokenizer_of(checkpoint: Checkpoint, path: Path) -> Tokenizer:
    """The tokenizer of a checkpoint: from a GGUF file's metadata, or from the folder's files."""
    if checkpoint.metadata:
        return Tokenizer.from_gguf(checkpoint.metadata, source=str(path))
    return Tokenizer.from_folder(path)
