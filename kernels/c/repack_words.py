"""Repacks the codes of GPTQ, AWQ and compressed-tensors to the layout of kernels/weights/grouped.py, in C
(repack_words.c)."""

from __future__ import annotations

from torch import Tensor

from .calls import make
from .recorded_calls import run

ROWS, COLUMNS, AWQ = range(
    3
)  # the next word in memory: the row's next one, that of the next row, or that of the next eight rows


def repack_words(words: Tensor, order: int, codes: Tensor, bits: int, flip: int = 0) -> None:
    """Sets ``codes`` [N / 16, K / 32, bits, 16] (int32) to the codes of a matrix [N, K] from its ``words``, contiguous
    int32 in one of these orders:

        ROWS     [N, K * bits / 32]    codes along a row, the first in the lowest bits
        COLUMNS  [K * bits / 32, N]    the same, transposed
        AWQ      [K, N / 8]            codes of eight rows, in AutoAWQ's order

    ``flip``: bits of every word that are inverted."""
    tile_rows, tiles, _, rows_of_tile = codes.shape
    run(
        make.repack_words(
            codes=codes,
            words=words,
            rows=tile_rows * rows_of_tile,
            columns=32 * tiles,
            bits=bits,
            order=order,
            flip=flip,
        )
    )
