"""Quantised matrices of GPTQ, as AutoGPTQ and GPTQModel store them.

    qweight  int32 [K * bits / 32, N]         codes along K, the first in the lowest bits
    qzeros   int32 [groups, N * bits / 32]    zero points along N; "gptq" stores them minus 1, "gptq_v2" unchanged
    scales   [groups, N]
    g_idx    int32 [K]                        the group of each column

AutoGPTQ's and vLLM's kernels add the 1 after unpacking, so that a stored 15 of 4 bits means 16. GPTQModel subtracts and
adds it in whole words, so that a zero point of 0 borrows from the next one. For files of GPTQModel, so does this
module.

With desc_act, the columns of a group are not contiguous. The format int4 does not support this, so the matrix becomes
dense."""

from __future__ import annotations

import torch
from torch import Tensor

from qwenkern.kernels import Weight

from . import integers
from .parts import FLOATS, Read, Stored

PARTS = ("qweight", "qzeros", "scales", "g_idx")
_ONES = {4: 0x11111111, 8: 0x01010101}


def plan(stored: Stored, read: Read) -> Weight | None:
    """The weight that the matrix becomes, on the meta device; None if it becomes dense. Checks the headers, and reads
    g_idx. Raises CheckpointError."""
    groups = stored.groups()
    stored.only(*PARTS)
    stored.require("qweight", ("I32",), (stored.words(stored.columns), stored.rows))
    stored.require("qzeros", ("I32",), (groups, stored.words(stored.rows)))
    scales = stored.require("scales", FLOATS, (groups, stored.rows))
    return integers.planned(stored, scales.dtype, in_order=_groups(stored, read) is None)


def load(stored: Stored, read: Read, dtype: torch.dtype, to: Weight | None) -> Weight | Tensor:
    """Loads the matrix into ``to``, or returns a dense one if ``to`` is None. Raises CheckpointError for invalid
    values."""
    words = integers.Words(read("qweight"), integers.COLUMNS, stored.quantization.bits)
    scales = integers.checked_scales(stored, "scales", read("scales"))
    zeros = integers.checked_zeros(stored, "qzeros", _zeros(stored, read("qzeros")))
    return integers.matrix(stored, words, scales.T, zeros.T, dtype, to, _groups(stored, read))


def _groups(stored: Stored, read: Read) -> Tensor | None:
    if "g_idx" not in stored.parts:
        return None
    stored.require("g_idx", ("I32",), (stored.columns,))
    return integers.checked_groups(stored, "g_idx", read("g_idx"))


def _zeros(stored: Stored, words: Tensor) -> Tensor:
    """The zero points [groups, N], int16."""
    bits = stored.quantization.bits
    if stored.quantization.carries:
        words = words + _ONES[bits]
    zeros = integers.unpacked(words, bits).to(torch.int16)
    return zeros if stored.quantization.carries or stored.quantization.storage == "gptq_v2" else zeros + 1
