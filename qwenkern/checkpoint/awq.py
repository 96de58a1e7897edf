"""Quantised matrices of AWQ in AutoAWQ's gemm layout.

qweight  int32 [K, N / 8]         codes of 4 bits along N, those of a word in the order 0, 2, 4, 6, 1, 3, 5, 7
qzeros   int32 [groups, N / 8]    zero points in the same order
scales   [groups, N]
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwenkern.kernels import Weight
from qwenkern.kernels.c import repack_words

from . import integers
from .parts import FLOATS, Read, Stored

PARTS = ("qweight", "qzeros", "scales")


def plan(stored: Stored, read: Read) -> Weight | None:
    """The weight that the matrix becomes, on the meta device; None for a dense one. Checks the headers. Raises
    CheckpointError."""
    groups = stored.groups()
    stored.only(*PARTS)
    stored.require("qweight", ("I32",), (stored.columns, stored.words(stored.rows)))
    stored.require("qzeros", ("I32",), (groups, stored.words(stored.rows)))
    scales = stored.require("scales", FLOATS, (groups, stored.rows))
    return integers.planned(stored, scales.dtype, in_order=True)


def load(stored: Stored, read: Read, dtype: torch.dtype, to: Weight | None) -> Weight | Tensor:
    """The matrix in ``to``, or without it a dense one. Raises CheckpointError for values that it cannot have."""
    words = integers.Words(read("qweight"), repack_words.AWQ, 4)
    zeros = integers.awq_rows(integers.unpacked(read("qzeros"), 4))
    scales = integers.checked_scales(stored, "scales", read("scales"))
    return integers.matrix(stored, words, scales.T, zeros.T, dtype, to)
