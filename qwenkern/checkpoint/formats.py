"""Which format each matrix of a model gets. Loading and the memory arithmetic of footprint/ both ask here."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import torch

from qwenkern.config import Config
from qwenkern.errors import RequestError, shown
from qwenkern.kernels import Weight
from qwenkern.kernels.weights import FORMATS, Dense

from .mixes import MIXES, mixed
from .packing import EMBEDDING, HEAD, slots

# What embedding and head get where the layers get this format: their rounding costs more quality than that of others.
_OF_EMBEDDINGS = {"int4": "int8"}


def formats_of(config: Config, quantize: str | None, dtype: torch.dtype) -> dict[str, Weight]:
    """The matrices of a model that is quantised in this way, by Hugging Face's name, each as a weight without memory
    (on torch's device `meta`).

    quantize: None (dense), the name of a format, or one of llama.cpp's mixes (mixes.py). A matrix whose shape the
    format does not take is dense. Raises RequestError for another name."""
    if quantize is not None and quantize not in FORMATS and quantize not in MIXES:
        expected = ", ".join(map(repr, (*FORMATS, *MIXES)))
        raise RequestError(f"quantize is {shown(quantize)}; expected None or one of {expected}")
    shapes = matrices(config)
    if quantize in MIXES:
        wanted: Mapping[str, str] = mixed(quantize, shapes, config.num_hidden_layers)
    else:
        form = quantize or Dense.format
        wanted = dict.fromkeys(shapes, form)
        for name in {EMBEDDING, HEAD} & shapes.keys():
            wanted[name] = _OF_EMBEDDINGS.get(form, form)
    return {name: without_memory(*shapes[name], wanted[name], dtype) for name in shapes}


def matrices(config: Config) -> dict[str, tuple[int, int]]:
    """The shape of each matrix of a checkpoint, by Hugging Face's name."""
    return {name: (slot.shape[0], slot.shape[1]) for name, slot in slots(config).items() if len(slot.shape) == 2}


def num_vector_values(config: Config) -> int:
    """The number of values of all norms and biases."""
    return sum(math.prod(slot.shape) for slot in slots(config).values() if len(slot.shape) == 1)


@functools.lru_cache(maxsize=256)
def without_memory(rows: int, columns: int, form: str, dtype: torch.dtype) -> Weight:
    """A weight of this format on torch's device `meta`; a dense one if the format is not ours or does not take the
    shape."""
    try:
        return FORMATS.get(form, Dense).allocate(rows, columns, dtype, _described)
    except ValueError:
        return Dense.allocate(rows, columns, dtype, _described)


def _described(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
