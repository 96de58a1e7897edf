"""Loads a model by its name: its module, tokenizer and generation settings."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from .allocation import give_back
from .arguments import whole
from .checkpoint import Checkpoint, load_weights, open_checkpoint
from .config import Config
from .conversion import choose_conversion
from .device import choose_dtype
from .errors import RequestError, shown
from .footprint import layout_of, refuse_too_large
from .generation import Generation
from .hub.names import resolve
from .kernels import Weight, prepare
from .kernels.weights import Dense
from .qwen2 import Qwen2
from .text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]  # (task, bytes so far, all bytes)
Tensors = Iterator[tuple[str, torch.Tensor | Weight]]


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
    kv_cache_dtype: str | torch.dtype = "auto",
    cache_tokens: int | None = None,
) -> Loaded:
    """Loads the model, and downloads it first if it is not on this machine. Raises as Model.from_pretrained does.

    kv_cache_dtype, cache_tokens: of the key-value cache, which must fit into the memory beside the weights."""
    if progress is not None and not callable(progress):
        raise RequestError(f"progress is {shown(progress)}; expected a function or None")
    choose_conversion(quantize)
    cache_tokens = whole("cache_tokens", cache_tokens, 1, optional=True)

    def refuse(config: Config, stored: Mapping[str, Weight] | None = None) -> None:
        layout = layout_of(config, device, quantize=quantize, stored=stored, dtype=dtype, kv_cache_dtype=kv_cache_dtype)
        is_ours = config.quantization is not None and config.quantization.method == "qwenkern"
        mapped = sum(weight.nbytes for weight in layout.matrices.values() if weight.format != Dense.format)
        refuse_too_large(layout, device, str(model), cache_tokens, mapped if is_ours and not layout.on_gpu else 0)

    path, checkpoint = find(model, progress, refuse)
    started = time.perf_counter()
    conversion = choose_conversion(quantize, checkpoint)
    refuse(checkpoint.config, checkpoint.formats)
    dtype = choose_dtype(dtype, checkpoint.config, device, conversion.is_quantised)
    prepare(device, dtype)
    with ThreadPoolExecutor(1) as beside:  # the conversion of weights releases the interpreter's lock
        tokenizer = beside.submit(tokenizer_of, checkpoint, path)
        module = Qwen2(checkpoint.config, dtype, device, allocated=False)
        tensors = _unless_failed(tokenizer, checkpoint.tensors(dtype, conversion.is_dense))
        if progress:
            tensors = _reported(tensors, progress, checkpoint.num_bytes(dtype, conversion.is_dense))
        tensors = conversion.of(tensors, checkpoint.config, dtype)
        load_weights(module, checkpoint.config, tensors, source=str(path))
        loaded = Loaded(module, tokenizer.result(), checkpoint.generation)
    give_back()
    logger.info("loaded %s as %s on %s in %.1f s", path, dtype, device, time.perf_counter() - started)
    return loaded


def _unless_failed(task: Future[Tokenizer], tensors: Tensors) -> Tensors:
    """Yields the tensors. If a task that runs at the same time fails meanwhile, raises its error."""
    for each in tensors:
        if task.done():
            task.result()
        yield each


def _reported(tensors: Tensors, progress: Progress, total: int) -> Tensors:
    """Yields the tensors. After each one, ``progress`` gets the bytes so far, as the checkpoint yields them."""
    done = 0
    for name, tensor in tensors:
        yield name, tensor
        done += tensor.nbytes
        progress("load", done, total)


def find(
    model: str | Path, progress: Progress | None = None, accept: Callable[[Config], None] | None = None
) -> tuple[Path, Checkpoint]:
    """The path of a model, which is downloaded if necessary, and its checkpoint, without reading a weight. ``accept``
    may refuse a configuration before its weights are downloaded."""
    report = progress and (lambda origin, done, total: progress(f"download from {origin}", done, total))
    path = resolve(model, report, accept)
    return path, open_checkpoint(path)


def tokenizer_of(checkpoint: Checkpoint, path: Path) -> Tokenizer:
    """The tokenizer of a checkpoint: from a GGUF file's metadata, or from the folder's files."""
    if checkpoint.metadata:
        return Tokenizer.from_gguf(checkpoint.metadata, source=str(path))
    return Tokenizer.from_folder(path)
