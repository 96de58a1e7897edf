"""Products of more than 16 tokens with a weight: the library's product. A kernel dequantises packed weights first, in
several iterations over their rows.

    weight [N, K], packed                       scratch [rows, K], 16 bits             out [T, N]
    ░░░░░░░░░░░░░ iteration 0     ─ kernel ─►  ▒▒▒▒▒▒▒▒▒▒▒▒▒  ─ library's product ─►  │▒▒▒▒│    │    │
    ░░░░░░░░░░░░░ iteration 1                                                       iteration 0

An iteration has at most SCRATCH bytes of dequantised rows, so that a prefill needs little memory, and an L2 cache of
50 MB keeps many of the dequantised rows for the product. All iterations have equally many rows: a short last one would
leave multiprocessors idle. In a captured graph the scratch lies in the graphs' memory pool, which all layers share.

A kernel that dequantises tiles within the product would write no rows to memory. But it would dequantise each tile
again for every 128 tokens, and the library's products run at 790 TFLOP/s on an H100. gate_up of Qwen2.5-3B in int4 has
23.6 MB. Its product with 512 tokens takes 58 us. Dequantising takes 38 us if all of the 90 MB go to memory, and 17 us
of integer and float32 operations if they stay in the L2 cache.

Packed weights are small in comparison: reading 23.6 MB three times moves fewer bytes than writing 90 MB once. So up to
PACKED_TOKENS tokens run in the few-token kernel, 16 tokens at a time. A token's bits do not depend on the other slices.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..weights import Dense, Stack, Weight
from .dequantise import dequantise_rows
from .few_tokens import MAX_TOKENS
from .launching import cdiv

SCRATCH = 1 << 26  # bytes of dequantised rows
BLOCK = 128  # rows of the weight in a tile of the library's product
PACKED_TOKENS = 3 * MAX_TOKENS


def few_enough(x: Tensor, weight: Weight) -> bool:
    """Whether the few-token kernels take this number of tokens, in ``slices``."""
    return len(x) <= (MAX_TOKENS if isinstance(weight, Dense) else PACKED_TOKENS)


def slices(*tensors: Any) -> Iterator[tuple[Any, ...]]:
    """The slices of tensors [T, ...] for each launch of a few-token kernel. None stays None."""
    size = len(tensors[0])
    if size <= MAX_TOKENS:
        yield tensors
        return
    for start in range(0, size, MAX_TOKENS):
        yield tuple(None if each is None else each[start : start + MAX_TOKENS] for each in tensors)


def product(x: Tensor, weight: Weight, bias: Tensor | None = None, addend: Tensor | None = None) -> Tensor:
    """x [T, K] times weight [N, K] transposed, plus bias [N], plus addend [T, N]: [T, N]. Without a bias, the addend is
    added in float32, and the sum is rounded once."""
    if bias is not None and addend is not None:
        return addend + product(x, weight, bias)
    if isinstance(weight, Dense):
        return F.linear(x, weight.tensor, bias) if addend is None else torch.addmm(addend, x, weight.tensor.t())
    added = addend if bias is None else bias
    out = x.new_empty(len(x), len(weight))
    for first, rows in _turns(weight):
        columns = slice(first, first + len(rows))
        if added is None:
            torch.mm(x, rows.t(), out=out[:, columns])
        else:
            torch.addmm(added[..., columns], x, rows.t(), out=out[:, columns])
    return out


def _turns(weight: Weight) -> Iterator[tuple[int, Tensor]]:
    """All rows of a weight, dequantised in several iterations: the number of the first row, and rows [R, K], which the
    next iteration overwrites."""
    parts, before = weight.parts if isinstance(weight, Stack) else (weight,), 0
    columns, itemsize = weight.shape[1], weight.dtype.itemsize
    by_kernel = [part for part in parts if part.triton_dequantise is not None]
    most = max([rows_of_a_turn(len(part), columns, itemsize) for part in by_kernel], default=0)
    scratch = torch.empty(most, columns, dtype=weight.dtype, device=weight.device)  # one for all parts
    for part in parts:
        if part.triton_dequantise is None:
            yield before, part.dequantise()
        else:
            turn = rows_of_a_turn(len(part), columns, itemsize)
            for start in range(0, len(part), turn):
                rows = scratch[: min(turn, len(part) - start)]
                dequantise_rows(rows, part, start)
                yield before + start, rows
        before += len(part)


def rows_of_a_turn(rows: int, columns: int, itemsize: int) -> int:
    """The number of rows of an iteration: a multiple of the rows of a tile of the library's product, or all rows."""
    most = max(1, SCRATCH // (BLOCK * columns * itemsize))  # blocks
    return min(rows, BLOCK * cdiv(rows, BLOCK * cdiv(rows, BLOCK * most)))
