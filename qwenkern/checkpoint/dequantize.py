"""Converts GGUF's tensor types to float tensors: floats, and the block formats of blocks.py.

Every product is exact in float32. So only the sum and the conversion to the wanted dtype are rounded.

One thread converts the weights in chunks that stay in the processor's cache. Measured on two cores, one thread converts
650 (Q5_0) to 2,000 (Q8_0) million weights per second. Two of torch's threads convert up to half more on an idle
machine, but only 25 to 500 million on a busy one, because each of the fifteen short operations of a chunk ends in a
barrier. Two Python threads are no faster than one, because they wait for the interpreter's lock.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from qwenkern.errors import CheckpointError
from qwenkern.kernels.c import threads

from .blocks import format_of, read

_CHUNK = 1 << 19  # weights: 2 MiB as float32
NOT_FINITE = "{name}: {kind} blocks with scales that are NaN or infinite; expected finite numbers"
_PLAIN = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}


def is_float(kind: GGMLQuantizationType) -> bool:
    """Whether a type holds floats, not blocks."""
    return kind in _PLAIN


@functools.cache
def is_supported(kind: GGMLQuantizationType) -> bool:
    """Whether ``dequantize`` takes this type: floats, the formats of blocks.py, and what the gguf library converts."""
    if kind in _PLAIN or format_of(kind):
        return True
    try:
        quants.dequantize(np.zeros(GGML_QUANT_SIZES[kind][1], np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def supported() -> list[str]:
    """The names of the types that ``dequantize`` takes."""
    return sorted(kind.name for kind in GGML_QUANT_SIZES if is_supported(kind))


def dequantize(blocks: np.ndarray, kind: GGMLQuantizationType, out: torch.Tensor, name: str) -> torch.Tensor:
    """Writes the weights of `blocks` into `out`, and returns `out`.

    blocks: uint8, contiguous, any shape (a memory-mapped, read-only view is fine). name: of the tensor, for messages.
    out: float32, bfloat16 or float16, contiguous, on the CPU. Weights are rounded to its dtype, to nearest even.
    Raises CheckpointError for a type that is not supported, if the number of bytes does not fit that of the weights,
    and for blocks whose scales are not finite.
    """
    if not is_supported(kind):
        raise CheckpointError(f"{name}: type {kind.name} is not supported; expected one of {', '.join(supported())}")
    block_size, type_size = GGML_QUANT_SIZES[kind]
    if blocks.dtype != np.uint8 or blocks.size * block_size != out.numel() * type_size:
        raise CheckpointError(
            f"{name}: {blocks.size} {blocks.dtype} of {kind.name} for {out.numel()} weights; "
            f"expected uint8, {type_size} for each {block_size} weights"
        )
    rows = blocks.reshape(-1, type_size)
    flat = out.view(-1, block_size)
    decode = _copy if kind in _PLAIN else _decode if format_of(kind) else _by_library
    step = _CHUNK // block_size
    with torch.no_grad(), threads.one_in_torch():
        for start in range(0, len(rows), step):
            if not decode(rows[start : start + step], kind, flat[start : start + step]):
                raise CheckpointError(NOT_FINITE.format(name=name, kind=kind.name))
    return out


def _copy(rows: np.ndarray, kind: GGMLQuantizationType, out: torch.Tensor) -> bool:
    out.copy_(torch.from_numpy(rows.copy()).view(_PLAIN[kind]))
    return True  # floats are not checked


def _by_library(rows: np.ndarray, kind: GGMLQuantizationType, out: torch.Tensor) -> bool:
    values = torch.from_numpy(quants.dequantize(rows.copy(), kind))
    out.copy_(values.view(out.shape))
    return bool(values.isfinite().all())


def _decode(rows: np.ndarray, kind: GGMLQuantizationType, out: torch.Tensor) -> bool:
    """Returns whether all scales are finite."""
    parts, form = read(rows, kind), format_of(kind)
    assert form is not None
    codes = parts.codes.sub_(form.zero).view(torch.int8) if form.zero else parts.codes
    scale = parts.scales.float()[:, None]
    offset = None if parts.minima is None else parts.minima.float()[:, None]
    if parts.sub_scales is not None:
        scale = scale * parts.sub_scales
    if offset is not None and parts.sub_minima is not None:
        offset = -(offset * parts.sub_minima)
    weights = codes.view(*scale.shape, -1) * scale[..., None]
    if offset is not None:
        weights += offset[..., None]
    out.copy_(weights.view(out.shape))
    return all(bool(each.isfinite().all()) for each in (parts.scales, parts.minima) if each is not None)
