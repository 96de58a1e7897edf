"""Repacks the blocks of GGUF files to the layout of kernels/weights/grouped.py, in C (repack.c, blocks.h)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..weights import Grouped
from ..weights.grouped import ROWS
from .calls import LAYOUT, Call, make
from .recorded_calls import play

FORMATS = {name: number for number, name in enumerate(LAYOUT.lists["BLOCK_FORMAT"])}


def repack(tasks: Sequence[tuple[Tensor, Grouped]]) -> list[bool]:
    """Sets the values of each weight [N, K] to those of its blocks: a contiguous tensor of N rows, uint8. The weights
    lie on the CPU, and have formats of FORMATS. Returns for each weight whether all values are finite.

    One team of threads repacks all weights, because to start a team takes as long as to repack a small matrix."""
    finite = [torch.empty(len(weight) // ROWS, dtype=torch.uint8, device="cpu") for _, weight in tasks]
    calls = [_call(blocks, weight, each) for (blocks, weight), each in zip(tasks, finite, strict=True)]
    play(b"".join(packed for _, packed, _ in calls), len(calls))
    return [bool(each.all()) for each in finite]


def _call(blocks: Tensor, weight: Grouped, finite: Tensor) -> Call:
    rows, columns = weight.shape
    return make.repack(
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
