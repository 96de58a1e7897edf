"""Moves the blocks of GGUF files to the layout of kernels/weights/grouped.py, in C (repack.c, blocks.h)."""

from __future__ import annotations

from torch import Tensor

from ..weights import Grouped
from .calls import LAYOUT, make
from .recorded_calls import run

FORMATS = {name: number for number, name in enumerate(LAYOUT.lists["BLOCK_FORMAT"])}


def repack(blocks: Tensor, weight: Grouped) -> None:
    """Sets the values of a weight [N, K] to those of its blocks: uint8, contiguous, N rows of them. The weight lies on
    the CPU, and its format is one of FORMATS."""
    rows, columns = weight.shape
    run(
        make.repack(
            codes=weight.codes,
            high=weight.high,
            scales=weight.scales,
            minima=weight.minima,
            sub_scales=weight.sub_scales,
            sub_minima=weight.sub_minima,
            blocks=blocks,
            rows=rows,
            columns=columns,
            format=FORMATS[weight.format],
        )
    )
