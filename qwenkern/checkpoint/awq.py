"""Quantised matrices of AWQ in AutoAWQ's gemm layout.

qweight  int32 [K, N / 8]         codes of 4 bits along N, the columns of a word in the order _ORDER
qzeros   int32 [groups, N / 8]    zero points in the same order
scales   [groups, N]
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwenkern.kernels import Weight

from . import integers
from .parts import FLOATS, Read, Stored

PARTS = ("qweight", "qzeros", "scales")
_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # the column that bits 4 i to 4 i + 3 of a word are of
_PLACE = [_ORDER.index(column) for column in range(8)]


def plan(stored: Stored, read: Read) -> Weight | None:
    """The weight that the matrix becomes, on the meta device; None for a dense one. Checks the headers. Raises
    CheckpointError."""
    groups = stored.groups()
    stored.only(*PARTS)
    stored.require("qweight", ("I32",), (stored.columns, stored.words(stored.rows)))
    stored.require("qzeros", ("I32",), (groups, stored.words(stored.rows)))
    scales = stored.require("scales", FLOATS, (groups, stored.rows))
    return integers.planned(stored, scales.dtype, in_order=True)


def load(stored: Stored, read: Read, dtype: torch.dtype) -> Weight:
    """The matrix. Raises CheckpointError for values that it cannot have."""
    codes, zeros = (_unpacked(read(part)) for part in ("qweight", "qzeros"))
    scales = integers.checked_scales(stored, "scales", read("scales"))
    return integers.matrix(stored, codes.T.contiguous(), scales.T, zeros.T, dtype)


def _unpacked(words: Tensor) -> Tensor:
    """[R, N / 8] words -> [R, N] codes, uint8."""
    return integers.unpacked(words, 4).unflatten(1, (-1, 8))[..., _PLACE].flatten(1)
