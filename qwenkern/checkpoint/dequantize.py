"""Converts GGML's block formats to float tensors, exactly as the ggml specification defines them.

A row of weights is stored as blocks of 32 (`Q4_0` ... `Q8_0`) or 256 weights (`Q2_K` ... `Q6_K`). A block holds small
integer codes, one scale for each group of codes, and for some types a minimum:

    weight = code * scale + offset

`_BLOCKS` gives each block's layout byte for byte, in the order of the structures in ggml's `ggml-common.h`. One small
function for each type converts blocks to codes, scales and offsets, and `_decode` multiplies. Every product is exact in
float32. So the only roundings are that of the sum and that to the wanted dtype.

Two things make it fast. First, eight codes are separated at a time, as the bytes of an int64, so a shift and a mask
cost an eighth. Second, the work goes in chunks that stay in the cache, on one thread. Measured on two cores, one thread
converts 650 (Q5_0) to 2,000 (Q8_0) million weights per second. Two of torch's threads convert up to half more on an
idle machine, but only 25 to 500 million on a busy one, because the fifteen short operations of a chunk each end in a
barrier. Two Python threads are no faster than one, because they wait for the interpreter's lock.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from qwenkern.errors import CheckpointError
from qwenkern.kernels.c import threads

_CHUNK = 1 << 19  # weights: 2 MiB as float32

# (n blocks) -> codes [n, groups, size] int8 or uint8; scale [n, groups] float32; offset [n, groups] float32 or None
_Parts = tuple[torch.Tensor, torch.Tensor, "torch.Tensor | None"]

_BLOCKS = {
    GGMLQuantizationType.Q4_0: [("d", "<f2"), ("qs", "V16")],
    GGMLQuantizationType.Q4_1: [("d", "<f2"), ("m", "<f2"), ("qs", "V16")],
    GGMLQuantizationType.Q5_0: [("d", "<f2"), ("qh", "V4"), ("qs", "V16")],
    GGMLQuantizationType.Q5_1: [("d", "<f2"), ("m", "<f2"), ("qh", "V4"), ("qs", "V16")],
    GGMLQuantizationType.Q8_0: [("d", "<f2"), ("qs", "V32")],
    GGMLQuantizationType.Q2_K: [("scales", "V16"), ("qs", "V64"), ("d", "<f2"), ("dmin", "<f2")],
    GGMLQuantizationType.Q3_K: [("hmask", "V32"), ("qs", "V64"), ("scales", "V12"), ("d", "<f2")],
    GGMLQuantizationType.Q4_K: [("d", "<f2"), ("dmin", "<f2"), ("scales", "V12"), ("qs", "V128")],
    GGMLQuantizationType.Q5_K: [("d", "<f2"), ("dmin", "<f2"), ("scales", "V12"), ("qh", "V32"), ("qs", "V128")],
    GGMLQuantizationType.Q6_K: [("ql", "V128"), ("qh", "V64"), ("scales", "V16"), ("d", "<f2")],
}
_PLAIN = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
SUPPORTED = frozenset(_BLOCKS) | frozenset(_PLAIN)

_EVERY_BYTE = {torch.int64: 0x0101010101010101, torch.int32: 0x01010101}
_HALVES, _QUARTERS, _BITS = (torch.arange(0, 8, step, device="cpu")[:, None] for step in (4, 2, 1))
# byte -> eight bytes, 1 where the bit is set, lowest bit first
_BYTES, _PLACES = torch.arange(256, device="cpu"), torch.arange(8, device="cpu")
_BITS_OF_BYTE = (_BYTES[:, None] >> _PLACES & 1).to(torch.uint8).view(torch.int64).flatten()


def dequantize(blocks: np.ndarray, kind: GGMLQuantizationType, out: torch.Tensor) -> torch.Tensor:
    """Writes the weights of `blocks` into `out`, and returns `out`.

    blocks: uint8, contiguous, any shape (a memory-mapped, read-only view is fine).
    out: float32, bfloat16 or float16, contiguous, on the CPU. Weights are rounded to its dtype to nearest even.
    Raises CheckpointError for a type outside SUPPORTED, and if the number of bytes does not fit that of the weights.
    """
    if kind not in SUPPORTED:
        names = ", ".join(sorted(k.name for k in SUPPORTED))
        raise CheckpointError(f"tensor type {kind.name} is not supported; expected one of {names}")
    block_size, type_size = GGML_QUANT_SIZES[kind]
    if blocks.dtype != np.uint8 or blocks.size * block_size != out.numel() * type_size:
        raise CheckpointError(
            f"{blocks.size} {blocks.dtype} of {kind.name} for {out.numel()} weights; "
            f"expected uint8, {type_size} for each {block_size} weights"
        )
    rows = blocks.reshape(-1, type_size)
    flat = out.view(-1, block_size)
    decode = _copy if kind in _PLAIN else _decode
    step = _CHUNK // block_size
    with torch.no_grad(), threads.one_in_torch():
        for start in range(0, len(rows), step):
            decode(rows[start : start + step], kind, flat[start : start + step])
    return out


def _copy(rows: np.ndarray, kind: GGMLQuantizationType, out: torch.Tensor) -> None:
    out.copy_(torch.from_numpy(rows.copy()).view(_PLAIN[kind]))


def _decode(rows: np.ndarray, kind: GGMLQuantizationType, out: torch.Tensor) -> None:
    codes, scale, offset = _PARTS[kind](rows.view(_BLOCKS[kind]).reshape(-1))
    weights = codes.view(*scale.shape, -1) * scale[..., None]
    if offset is not None:
        weights += offset[..., None]
    out.copy_(weights.view(out.shape))


# --- the parts of each type -------------------------------------------------------------------------------------------


def _words(field: np.ndarray, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """n fields of k bytes, strided -> [n, k / size of dtype], contiguous."""
    return torch.from_numpy(field.copy().view(np.uint8)).view(dtype).view(len(field), -1)


def _floats(field: np.ndarray) -> torch.Tensor:
    """n float16 -> [n, 1] float32, exact."""
    return torch.from_numpy(field.astype(np.float32)).view(-1, 1)


def _spread(words: torch.Tensor, shifts: torch.Tensor, mask: int) -> torch.Tensor:
    """[..., k] words -> [..., shifts, k]: the bytes of each word shifted right, then masked."""
    return (words.unsqueeze(-2) >> shifts.to(words.dtype)).bitwise_and_(mask * _EVERY_BYTE[words.dtype])


def _signed(words: torch.Tensor, zero: int) -> torch.Tensor:
    """The bytes of the words, less `zero`: int8."""
    return words.view(torch.int8).sub_(zero)


def _q4(blocks: np.ndarray) -> torch.Tensor:
    """[n, 2, 2] words: the low halves of the 16 bytes are the first 16 codes, the high halves the others."""
    return _spread(_words(blocks["qs"]), _HALVES, 0x0F)


def _q5(blocks: np.ndarray) -> torch.Tensor:
    """As _q4, with the fifth bit of code i in bit i of the 32-bit `qh`."""
    bits = _BITS_OF_BYTE.index_select(0, _words(blocks["qh"], torch.uint8).flatten().int())
    return _q4(blocks).bitwise_or_((bits << 4).view(-1, 2, 2))


def _q4_0(blocks: np.ndarray) -> _Parts:
    return _signed(_q4(blocks), 8), _floats(blocks["d"]), None


def _q4_1(blocks: np.ndarray) -> _Parts:
    return _q4(blocks).view(torch.uint8), _floats(blocks["d"]), _floats(blocks["m"])


def _q5_0(blocks: np.ndarray) -> _Parts:
    return _signed(_q5(blocks), 16), _floats(blocks["d"]), None


def _q5_1(blocks: np.ndarray) -> _Parts:
    return _q5(blocks).view(torch.uint8), _floats(blocks["d"]), _floats(blocks["m"])


def _q8_0(blocks: np.ndarray) -> _Parts:
    return _words(blocks["qs"], torch.int8), _floats(blocks["d"]), None


def _q2_k(blocks: np.ndarray) -> _Parts:
    codes = _spread(_words(blocks["qs"]).view(-1, 2, 4), _QUARTERS, 0x03)
    scales = _words(blocks["scales"], torch.uint8)
    return codes.view(torch.uint8), _floats(blocks["d"]) * (scales & 15), -(_floats(blocks["dmin"]) * (scales >> 4))


def _q3_k(blocks: np.ndarray) -> _Parts:
    codes = _spread(_words(blocks["qs"]).view(-1, 2, 4), _QUARTERS, 0x03).view(-1, 8, 4)
    codes |= _spread(_words(blocks["hmask"]), _BITS, 0x01) << 2
    words = _words(
        blocks["scales"], torch.int32
    )  # 16 x 4 low bits in the first 8 bytes, 16 x 2 high bits in the last 4
    scales = _spread(words[:, :2], _HALVES, 0x0F)
    scales |= _spread(words[:, 2:], _QUARTERS, 0x03).view(-1, 2, 2) << 4
    return _signed(codes, 4), _floats(blocks["d"]) * _signed(scales, 32).view(-1, 16), None


def _k_scales(blocks: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Q4_K and Q5_K: eight 6-bit scales and eight 6-bit minima in 12 bytes -> scale, offset [n, 8] float32."""
    low_scale, low_min, high = _words(blocks["scales"], torch.int32).unbind(1)
    scales = torch.stack([low_scale & 0x3F3F3F3F, high & 0x0F0F0F0F | low_scale >> 2 & 0x30303030], dim=1)
    minima = torch.stack([low_min & 0x3F3F3F3F, high >> 4 & 0x0F0F0F0F | low_min >> 2 & 0x30303030], dim=1)
    return _floats(blocks["d"]) * scales.view(torch.uint8), -(_floats(blocks["dmin"]) * minima.view(torch.uint8))


def _q4_k(blocks: np.ndarray) -> _Parts:
    codes = _spread(_words(blocks["qs"]).view(-1, 4, 4), _HALVES, 0x0F)
    return codes.view(torch.uint8), *_k_scales(blocks)


def _q5_k(blocks: np.ndarray) -> _Parts:
    codes = _spread(_words(blocks["qs"]).view(-1, 4, 4), _HALVES, 0x0F).view(-1, 8, 4)
    codes |= _spread(_words(blocks["qh"]), _BITS, 0x01) << 4
    return codes.view(torch.uint8), *_k_scales(blocks)


def _q6_k(blocks: np.ndarray) -> _Parts:
    codes = _spread(_words(blocks["ql"]).view(-1, 2, 8), _HALVES, 0x0F).view(-1, 2, 4, 4)
    codes |= _spread(_words(blocks["qh"]).view(-1, 2, 4), _QUARTERS, 0x03) << 4
    return _signed(codes, 32), _floats(blocks["d"]) * _words(blocks["scales"], torch.int8), None


_PARTS: dict[GGMLQuantizationType, Callable[[np.ndarray], _Parts]] = {
    GGMLQuantizationType.Q4_0: _q4_0,
    GGMLQuantizationType.Q4_1: _q4_1,
    GGMLQuantizationType.Q5_0: _q5_0,
    GGMLQuantizationType.Q5_1: _q5_1,
    GGMLQuantizationType.Q8_0: _q8_0,
    GGMLQuantizationType.Q2_K: _q2_k,
    GGMLQuantizationType.Q3_K: _q3_k,
    GGMLQuantizationType.Q4_K: _q4_k,
    GGMLQuantizationType.Q5_K: _q5_k,
    GGMLQuantizationType.Q6_K: _q6_k,
}
