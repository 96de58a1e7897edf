"""Reads GGML's block formats: the exact codes, scales and minima of blocks.

A row of weights is stored as blocks of 32 (`Q4_0` ... `Q8_0`) or 256 weights (`Q2_K` ... `Q6_K`). A block has small
integer codes, one scale for each group of codes, and for some types a minimum:

    weight = (code - zero) * scale + offset          kernels/weights/grouped.py has the formula with all its parts

`_LAYOUTS` has the layout of each block, in the order of the structures in ggml's `ggml-common.h`. A small function for
each type converts blocks to codes, scales and minima.

One shift and one mask separate eight codes at a time, as the bytes of an int64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import numpy as np
import torch
from gguf import GGMLQuantizationType

from qwenkern.kernels.weights import FORMATS, Grouped


class Blocks(NamedTuple):
    """The parts of n blocks. Codes are unsigned; the format's zero point is not subtracted yet. Grouped.from_codes
    takes the parts under these names."""

    codes: torch.Tensor  # [n, values of a block] uint8
    scales: torch.Tensor  # [n] float16
    minima: torch.Tensor | None = None  # [n] float16
    sub_scales: torch.Tensor | None = None  # [n, groups] uint8 or int8
    sub_minima: torch.Tensor | None = None  # [n, groups] uint8


_LAYOUTS = {
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

_EVERY_BYTE = {torch.int64: 0x0101010101010101, torch.int32: 0x01010101}
_HALVES, _QUARTERS, _BITS = (torch.arange(0, 8, step, device="cpu")[:, None] for step in (4, 2, 1))
# byte -> eight bytes, 1 where the bit is set, lowest bit first
_BYTES, _PLACES = torch.arange(256, device="cpu"), torch.arange(8, device="cpu")
_BITS_OF_BYTE = (_BYTES[:, None] >> _PLACES & 1).to(torch.uint8).view(torch.int64).flatten()


def format_of(kind: GGMLQuantizationType) -> type[Grouped] | None:
    """The weight format of a block format; None for floats, and for block formats that qwenkern has no kernels for."""
    return cast("type[Grouped]", FORMATS[kind.name.lower()]) if kind in _LAYOUTS else None


def read(rows: np.ndarray, kind: GGMLQuantizationType) -> Blocks:
    """The parts of blocks [n, bytes] (uint8, contiguous). `format_of` must have a format for the type."""
    return _PARTS[kind](rows.view(_LAYOUTS[kind]).reshape(-1))


# --- the parts of each type -------------------------------------------------------------------------------------------


def _words(field: np.ndarray, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """n fields of k bytes, strided -> [n, k / bytes of dtype], contiguous."""
    return torch.from_numpy(field.copy().view(np.uint8)).view(dtype).view(len(field), -1)


def _halves(field: np.ndarray) -> torch.Tensor:
    """n float16."""
    return torch.from_numpy(field.copy())


def _spread(words: torch.Tensor, shifts: torch.Tensor, mask: int) -> torch.Tensor:
    """[..., k] words -> [..., shifts, k]: the bytes of each word shifted right, then masked."""
    return (words.unsqueeze(-2) >> shifts.to(words.dtype)).bitwise_and_(mask * _EVERY_BYTE[words.dtype])


def _bytes(words: torch.Tensor) -> torch.Tensor:
    """The words of n blocks as bytes [n, ...]."""
    return words.view(torch.uint8).flatten(1)


def _q4(blocks: np.ndarray) -> torch.Tensor:
    """[n, 2, 2] words: the low halves of the 16 bytes are the first 16 codes, the high halves the others."""
    return _spread(_words(blocks["qs"]), _HALVES, 0x0F)


def _q5(blocks: np.ndarray) -> torch.Tensor:
    """As _q4, with the fifth bit of code i in bit i of the 32-bit `qh`."""
    bits = _BITS_OF_BYTE.index_select(0, _words(blocks["qh"], torch.uint8).flatten().int())
    return _q4(blocks).bitwise_or_((bits << 4).view(-1, 2, 2))


def _q4_0(blocks: np.ndarray) -> Blocks:
    return Blocks(_bytes(_q4(blocks)), _halves(blocks["d"]))


def _q4_1(blocks: np.ndarray) -> Blocks:
    return Blocks(_bytes(_q4(blocks)), _halves(blocks["d"]), _halves(blocks["m"]))


def _q5_0(blocks: np.ndarray) -> Blocks:
    return Blocks(_bytes(_q5(blocks)), _halves(blocks["d"]))


def _q5_1(blocks: np.ndarray) -> Blocks:
    return Blocks(_bytes(_q5(blocks)), _halves(blocks["d"]), _halves(blocks["m"]))


def _q8_0(blocks: np.ndarray) -> Blocks:
    """Signed bytes. Flipping the highest bit makes them unsigned codes."""
    return Blocks(_words(blocks["qs"], torch.uint8).bitwise_xor_(0x80), _halves(blocks["d"]))


def _q2_k(blocks: np.ndarray) -> Blocks:
    codes = _spread(_words(blocks["qs"]).view(-1, 2, 4), _QUARTERS, 0x03)
    scales = _words(blocks["scales"], torch.uint8)
    return Blocks(_bytes(codes), _halves(blocks["d"]), _halves(blocks["dmin"]), scales & 15, scales >> 4)


def _q3_k(blocks: np.ndarray) -> Blocks:
    codes = _spread(_words(blocks["qs"]).view(-1, 2, 4), _QUARTERS, 0x03).view(-1, 8, 4)
    codes |= _spread(_words(blocks["hmask"]), _BITS, 0x01) << 2
    # 16 x 4 low bits in the first 8 bytes, 16 x 2 high bits in the last 4
    words = _words(blocks["scales"], torch.int32)
    scales = _spread(words[:, :2], _HALVES, 0x0F)
    scales |= _spread(words[:, 2:], _QUARTERS, 0x03).view(-1, 2, 2) << 4
    return Blocks(_bytes(codes), _halves(blocks["d"]), None, _bytes(scales).sub_(32).view(torch.int8))


def _k_scales(blocks: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Q4_K and Q5_K: eight 6-bit scales and eight 6-bit minima in 12 bytes -> two [n, 8] uint8."""
    low_scale, low_min, high = _words(blocks["scales"], torch.int32).unbind(1)
    scales = torch.stack([low_scale & 0x3F3F3F3F, high & 0x0F0F0F0F | low_scale >> 2 & 0x30303030], dim=1)
    minima = torch.stack([low_min & 0x3F3F3F3F, high >> 4 & 0x0F0F0F0F | low_min >> 2 & 0x30303030], dim=1)
    return scales.view(torch.uint8), minima.view(torch.uint8)


def _q4_k(blocks: np.ndarray) -> Blocks:
    codes = _spread(_words(blocks["qs"]).view(-1, 4, 4), _HALVES, 0x0F)
    return Blocks(_bytes(codes), _halves(blocks["d"]), _halves(blocks["dmin"]), *_k_scales(blocks))


def _q5_k(blocks: np.ndarray) -> Blocks:
    codes = _spread(_words(blocks["qs"]).view(-1, 4, 4), _HALVES, 0x0F).view(-1, 8, 4)
    codes |= _spread(_words(blocks["qh"]), _BITS, 0x01) << 4
    return Blocks(_bytes(codes), _halves(blocks["d"]), _halves(blocks["dmin"]), *_k_scales(blocks))


def _q6_k(blocks: np.ndarray) -> Blocks:
    codes = _spread(_words(blocks["ql"]).view(-1, 2, 8), _HALVES, 0x0F).view(-1, 2, 4, 4)
    codes |= _spread(_words(blocks["qh"]).view(-1, 2, 4), _QUARTERS, 0x03) << 4
    return Blocks(_bytes(codes), _halves(blocks["d"]), None, _words(blocks["scales"], torch.int8))


_PARTS: dict[GGMLQuantizationType, Callable[[np.ndarray], Blocks]] = {
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
