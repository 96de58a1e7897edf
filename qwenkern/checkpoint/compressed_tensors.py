"""Quantised matrices of compressed-tensors (llm-compressor).

    weight             int8 [N, K], or float8_e4m3fn [N, K]
    weight_packed      int32 [N, K * bits / 32]: code + 2^(bits - 1) along K, the first in the lowest bits
    weight_shape       N, K, together with weight_packed
    weight_scale       [N, groups], [N, 1] for whole rows, [1] for a whole matrix
    weight_zero_point  int8 [N, groups]; with weight_packed int32 [N * bits / 32, groups], packed along N
    weight_g_idx       int32 [K], the group of each column, if the columns of a group are not contiguous

qwenkern reads quantised weights only. It ignores the scales of activations and of the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from qwenkern.kernels import Weight
from qwenkern.kernels.weights.fp8 import Fp8
from qwenkern.quantization_config import MATRIX

from . import integers
from .parts import FLOATS, Read, Stored

PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
IGNORED = ("input_scale", "input_zero_point", "output_scale", "output_zero_point", "k_scale", "v_scale", "q_scale")
CODES = ("I8", "F8_E4M3")  # dtypes of a quantised weight


def plan(stored: Stored, read: Read) -> Weight | None:
    """The weight that the matrix becomes, on the meta device; None if it becomes dense. Checks the headers, and reads
    weight_shape and weight_g_idx. Raises CheckpointError."""
    what, rows, columns, groups = stored.quantization, stored.rows, stored.columns, stored.groups()
    packed = what.storage == "pack-quantized"
    stored.only(*PARTS) if packed else stored.only("weight", "weight_scale", "weight_zero_point", "weight_g_idx")
    by_row = ((rows, groups), (rows,)) if groups == 1 else ((rows, groups),)
    of_groups = ((), (1,), (1, 1)) if what.group_size == MATRIX else by_row
    scales = stored.require("weight_scale", FLOATS, *of_groups)
    if what.kind == "float":
        stored.require("weight", ("F8_E4M3",), (rows, columns))
        return Fp8.allocate(rows, columns, torch.float32, integers.meta)
    if packed:
        stored.require("weight_packed", ("I32",), (rows, -(-columns * what.bits // 32)))
        stored.require("weight_shape", ("I32", "I64"), (2,))
        if (shape := read("weight_shape").tolist()) != [rows, columns]:
            raise stored.wrong("weight_shape", f"is {shape}", f"{[rows, columns]}, as the configuration says")
    else:
        stored.require("weight", ("I8",), (rows, columns))
    if "weight_zero_point" in stored.parts or not what.symmetric:
        if packed and what.group_size != MATRIX:
            stored.require("weight_zero_point", ("I32",), (-(-rows * what.bits // 32), groups))
        else:
            stored.require("weight_zero_point", ("I8",), *of_groups)
    return integers.planned(stored, scales.dtype, in_order=_groups(stored, read) is None)


def load(stored: Stored, read: Read, dtype: torch.dtype, to: Weight | None) -> Weight | Tensor:
    """Loads the matrix into ``to``, or returns a dense one if ``to`` is None. Raises CheckpointError for invalid
    values."""
    what = stored.quantization
    scales = integers.checked_scales(stored, "weight_scale", read("weight_scale"))
    scales = scales.reshape(-1, stored.groups()).expand(stored.rows, -1)
    if what.kind == "float":
        codes = read("weight")
        if codes.isnan().any():
            raise stored.wrong("weight", "has values that are NaN", "finite weights")
        weight = Fp8.from_codes(codes, scales[:, 0].float().contiguous(), dtype)
        if to is None:
            return weight.dequantise()
        for place, tensor in zip(to.tensors, weight.tensors, strict=True):
            place.copy_(tensor)
        return to
    zeros = _zeros(stored, read).expand(scales.shape)
    return integers.matrix(stored, _words(stored, read), scales, zeros, dtype, to, _groups(stored, read))


def _words(stored: Stored, read: Read) -> integers.Words:
    """The codes, which are stored as words or as bytes."""
    bits = stored.quantization.bits
    if stored.quantization.storage == "pack-quantized":
        return integers.Words(read("weight_packed"), integers.ROWS, bits)
    signed, middle = read("weight"), 1 << bits - 1
    low, high = int(signed.min()), int(signed.max())
    if low < -middle or high >= middle:
        raise stored.wrong("weight", f"has codes {low} to {high}", f"{-middle} to {middle - 1}, of {bits} bits")
    return integers.words_of_bytes(signed, bits)


def _zeros(stored: Stored, read: Read) -> Tensor:
    """The zero points of the unsigned codes, [N or 1, groups]."""
    what = stored.quantization
    middle = 1 << what.bits - 1
    if "weight_zero_point" not in stored.parts:
        return torch.full((1, 1), middle, dtype=torch.int16)
    if stored.parts["weight_zero_point"].dtype == "I32":
        along_rows = read("weight_zero_point").T
        zeros = integers.unpacked(along_rows, what.bits).T[: stored.rows].to(torch.int16)
    else:
        zeros = read("weight_zero_point").reshape(-1, stored.groups()).to(torch.int16) + middle
    return integers.checked_zeros(stored, "weight_zero_point", zeros)


def _groups(stored: Stored, read: Read) -> Tensor | None:
    if "weight_g_idx" not in stored.parts:
        return None
    stored.require("weight_g_idx", ("I32",), (stored.columns,))
    groups = read("weight_g_idx")
    return None if (groups == -1).all() else integers.checked_groups(stored, "weight_g_idx", groups)
