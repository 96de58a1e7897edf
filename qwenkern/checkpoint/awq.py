"""Quantised matrices of AWQ in AutoAWQ's gemm layout.

qweight  int32 [K, N / 8]         codes of 4 bits along N, in the order 0, 2, 4, 6, 1, 3, 5, 7 within a word
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
    """The weight that the matrix becomes, on the meta device; None if it becomes dense. Checks the headers. Raises
    CheckpointError."""
    groups = stored.groups()
    stored.only(*PARTS)
    stored.require("qweight", ("I32",), (stored.columns, stored.words(stored.rows)))
    stored.require("qzeros", ("I32",), (groups, stored.words(stored.rows)))
    scales = stored.require("scales", FLOATS, (groups, stored.rows))
    return integers.planned(stored, scales.dtype, in_order=True)


def load(stored: Stored, read: Read, dtype: torch.dtype, to: Weight | None) -> Weight | Tensor:
    """Loads the matrix into ``to``, or returns a dense one if ``to`` is None. Raises CheckpointError for invalid
    values."""
    words = integers.Words(read("qweight"), repack_words.AWQ, 4)
    zeros = integers.awq_rows(integers.unpacked(read("qzeros"), 4))
    scales = integers.checked_scales(stored, "scales", read("scales"))
    return integers.matrix(stored, words, scales.T, zeros.T, dtype, to)
