"""Dequantises rows of a weight: consecutive rows, for a product that the library computes, or the rows of given ids.

    out[r] = round(row first + r)    or    out[r] = round(row ids[r])

out is [R, K]. A value is computed in float32 and rounded once, so its bits are those of Weight.dequantise. Bytes moved:
the R rows as they are packed, and R K elements of out.

    program (r, c):  BLOCK_R rows and BLOCK_K columns

A program has 16 consecutive rows, because packed formats store 16 rows together: a thread loads 16 bytes at once. The
rows of ids may lie anywhere, so a program has one.
"""

from __future__ import annotations

import functools
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..language import cast, trap_unless, wait_for_inputs
from ..weights import Weight
from .backend import pdl_options
from .launching import cdiv, next_power_of_2, planned


@planned
@triton.jit(do_not_specialize=["num_rows"])
def _dequantise_kernel(
    out_ptr,  # [R, K]
    ids_ptr,  # [R], or None: rows from ``first`` on
    weight,  # [N, K], the named tuple of its format
    first,
    num_rows,  # R
    n_size,
    k_size,
    ROWS: tl.constexpr,  # this and the next are of the weight's format
    FORM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_R: tl.constexpr,
    EVEN_K: tl.constexpr,
    PDL: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    start = tl.program_id(1) * BLOCK_K
    wait_for_inputs(PDL)
    if ids_ptr is None:
        rows = first + at
        if not EVEN_R:
            rows = tl.minimum(rows, n_size - 1)
    else:
        rows = tl.load(ids_ptr + at, mask=at < num_rows, other=0).to(tl.int64)
        rows = tl.where(rows < 0, rows + n_size, rows)
        trap_unless((rows >= 0) & (rows < n_size))
    values = ROWS(weight, rows, start, k_size, FORM, BLOCK_K, EVEN_K)
    k = start + tl.arange(0, BLOCK_K)[None, :]
    mask = (at < num_rows)[:, None] & (k < k_size)
    tl.store(out_ptr + at[:, None] * k_size + k, cast(values, out_ptr.dtype.element_ty), mask=mask)


def dequantise_rows(out: Tensor, weight: Weight, first: int) -> None:
    """Fills out [R, K] with the R rows of a weight from ``first`` on."""
    _launch(out, None, weight, first)


def dequantise_ids(out: Tensor, weight: Weight, ids: Tensor) -> None:
    """Fills out [R, K] with the rows of a weight that ids [R] select. As in torch's indexing, a negative id counts from
    the end. An id out of range is a device error, after which the process can no longer use the device."""
    _launch(out, ids, weight, 0)


def _launch(out: Tensor, ids: Tensor | None, weight: Weight, first: int) -> None:
    num_rows, k_size = out.shape
    constants = _config(k_size, ids is not None)
    grid = cdiv(num_rows, constants["BLOCK_R"]), cdiv(k_size, constants["BLOCK_K"])
    _dequantise_kernel[grid](
        out, ids, weight.triton_arguments(), first, num_rows, len(weight), k_size,
        ROWS=weight.triton_dequantise, FORM=weight.triton_numbers(), EVEN_R=num_rows % constants["BLOCK_R"] == 0,
        **constants, **pdl_options(out),
    )  # fmt: skip


@functools.cache
def _config(k_size: int, by_ids: bool) -> dict[str, Any]:
    block_k = max(32, min(1024 if by_ids else 256, next_power_of_2(k_size)))
    return {
        "BLOCK_R": 1 if by_ids else 16,
        "BLOCK_K": block_k,
        "EVEN_K": k_size % block_k == 0,
        "num_warps": 4,
    }
