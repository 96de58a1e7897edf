"""Moves the blocks of GGUF files to the layout of kernels/weights/grouped.py, in C (repack.c, blocks.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..weights import Grouped
from ..weights.grouped import ROWS
from .calls import LAYOUT, make
from .recorded_calls import run

FORMATS = {name: number for number, name in enumerate(LAYOUT.lists["BLOCK_FORMAT"])}


def repack(blocks: Tensor, weight: Grouped) -> bool:
    """Sets the values of a weight [N, K] to those of its blocks: uint8, contiguous, N rows of them. The weight lies on
    the CPU, and its format is one of FORMATS. Returns whether all values are finite."""
    rows, columns = weight.shape
    finite = torch.empty(rows // ROWS, dtype=torch.uint8, device="cpu")
    run(
        make.repack(
            codes=weight.codes,
            high=weight.high,
            scales=weight.scales,
            minima=weight.minima,
            sub_scales=weight.sub_scales,
            sub_minima=weight.sub_minima,
            finite=finite,
            blocks=blocks,
            rows=rows,
            columns=columns,
            format=FORMATS[weight.format],
        )
    )
    return bool(finite.all())
