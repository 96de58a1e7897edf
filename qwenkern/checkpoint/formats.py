"""Chooses the format of each matrix of a model, both for loading and for the memory estimates of footprint/."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import torch

from qwenkern.config import Config
from qwenkern.errors import RequestError, shown
from qwenkern.kernels import Weight
from qwenkern.kernels.weights import FORMATS, Dense, Grouped
from qwenkern.kernels.weights.grouped import DEPTH
from qwenkern.quantization_config import MATRIX, ROW, Quantization

from .mixes import MIXES, mixed
from .packing import EMBEDDING, HEAD, slots

_OF_EMBEDDINGS = {"int4": "int8"}  # with 4 bits, these lose more quality than all layers together
NONE = ("none", Dense.format)  # values of quantize= that make all matrices dense


def form_of(name: str, quantize: str) -> str:
    """The format that ``quantize=`` requests for a matrix. ``name`` begins with the name of its module."""
    is_embedding = name.startswith((EMBEDDING.removesuffix(".weight"), HEAD.removesuffix(".weight")))
    return _OF_EMBEDDINGS.get(quantize, quantize) if is_embedding else quantize


def formats_of(config: Config, quantize: str | None, dtype: torch.dtype) -> dict[str, Weight]:
    """The matrices of a model that is quantised with ``quantize``, by Hugging Face's name, each as a weight without
    memory (on torch's device `meta`).

    quantize: None (dense), the name of a format, or one of llama.cpp's mixes (mixes.py). A matrix is dense if the
    format does not support its shape. Raises RequestError for another name."""
    if quantize is not None and quantize not in FORMATS and quantize not in MIXES:
        expected = ", ".join(map(repr, (*FORMATS, *MIXES)))
        raise RequestError(f"quantize is {shown(quantize)}; expected None or one of {expected}")
    shapes = matrices(config)
    if quantize in MIXES:
        wanted: Mapping[str, str] = mixed(quantize, shapes, config.num_hidden_layers)
    else:
        wanted = {name: form_of(name, quantize or Dense.format) for name in shapes}
    return {name: without_memory(*shapes[name], wanted[name], dtype) for name in shapes}


def matrices(config: Config) -> dict[str, tuple[int, int]]:
    """The shape of each matrix of a checkpoint, by Hugging Face's name."""
    return {name: (slot.shape[0], slot.shape[1]) for name, slot in slots(config).items() if len(slot.shape) == 2}


def num_vector_values(config: Config) -> int:
    """The number of values of all norms and biases."""
    return sum(math.prod(slot.shape) for slot in slots(config).values() if len(slot.shape) == 1)


def stored_formats(config: Config, dtype: torch.dtype) -> dict[str, Weight]:
    """The quantised matrices of a checkpoint by its quantization_config alone, as weights without memory. The
    configuration does not tell whether the columns of a group are contiguous."""
    found: dict[str, Weight] = {}
    what = config.quantization
    if what is None:
        return found
    for name, (rows, columns) in matrices(config).items():
        module, group = name.removesuffix(".weight"), None
        form = what.formats.get(module, Dense.format)
        if not what.formats and _is_quantised(module, what):
            form = "fp8" if what.kind == "float" else f"int{what.bits}"
            group = columns if what.group_size in (ROW, MATRIX) else what.group_size
        weight = without_memory(rows, columns, form, dtype, group)
        if not isinstance(weight, Dense) and (group or DEPTH) % DEPTH == 0:
            found[name] = weight
    return found


def _is_quantised(module: str, what: Quantization) -> bool:
    """Whether a linear layer is quantised. GPTQ and AWQ keep the output dense. All but qwenkern's own checkpoints keep
    the embedding dense."""
    if f"{module}.weight" in (EMBEDDING, HEAD) and (what.method != "compressed-tensors" or f"{module}.weight" != HEAD):
        return False
    return not what.ignores(module)


@functools.lru_cache(maxsize=256)
def without_memory(rows: int, columns: int, form: str, dtype: torch.dtype, group: int | None = None) -> Weight:
    """A weight of this format on torch's device `meta`; a dense one if qwenkern does not have the format, or if the
    format does not support the shape. ``group``: the size of a group, for formats that do not define it."""
    kind = FORMATS.get(form, Dense)
    try:
        if issubclass(kind, Grouped):
            return kind.allocate(rows, columns, dtype, _described, group)
        return kind.allocate(rows, columns, dtype, _described)
    except ValueError:
        return Dense.allocate(rows, columns, dtype, _described)


def _described(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
