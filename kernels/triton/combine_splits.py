"""The second kernel of decode_attention.py: the weighted sum of a sequence's splits, with a program for each query head
and part of D."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..language import cast, divide, exp2, launch_dependents, wait
from .backend import pdl_options
from .launching import planned


@triton.jit
def tokens_of_split(length, BLOCK_N: tl.constexpr, NUM_SPLITS: tl.constexpr, MIN_TOKENS: tl.constexpr):
    """The number of tokens in each split but the last: whole tiles, whose number depends only on the length."""
    return tl.maximum(tl.cdiv(tl.cdiv(length, BLOCK_N), NUM_SPLITS) * BLOCK_N, MIN_TOKENS)


@planned
@triton.jit(do_not_specialize=["num_tokens", "splits"])
def _combine_kernel(
    out_ptr,  # [S, Hq, D]
    parts_ptr,  # [S, Hq, splits, D] float32
    logs_ptr,  # [S, Hq, splits] float32
    lengths_ptr,  # [S], or None: num_tokens each
    num_tokens,
    splits,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    MIN_TOKENS: tl.constexpr,
    SETTLED: tl.constexpr,
    PDL: tl.constexpr,
):
    sequence = tl.program_id(2).to(tl.int64)
    head = sequence * tl.num_programs(1) + tl.program_id(1)
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.arange(0, NUM_SPLITS)
    launch_dependents(PDL)
    if not SETTLED:
        wait(PDL)
    length = num_tokens
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + sequence).to(tl.int32)
    mask = split * tokens_of_split(length, BLOCK_N, NUM_SPLITS, MIN_TOKENS) < length
    if SETTLED:
        wait(PDL)

    dtype = out_ptr.dtype.element_ty
    at = (head * splits + split)[:, None] * HEAD_DIM + column[None, :]
    parts = tl.load(parts_ptr + at, mask=mask[:, None], other=0.0)
    logs = tl.load(logs_ptr + head * splits + split, mask=mask, other=float("-inf"))
    weights = exp2(logs - tl.max(logs, axis=0), dtype)
    out = divide(tl.sum(weights[:, None] * parts, axis=0), tl.sum(weights, axis=0), dtype)
    tl.store(out_ptr + head * HEAD_DIM + column, cast(out, dtype))


def launch_combine(
    out: Tensor,
    parts: Tensor,
    logs: Tensor,
    lengths: Tensor | None,
    num_tokens: int,
    config: dict[str, Any],
    settled: bool,
) -> None:
    num_sequences, num_q_heads, splits, head_dim = parts.shape
    block_d = min(head_dim, 64)
    _combine_kernel[(head_dim // block_d, num_q_heads, num_sequences)](
        out,
        parts,
        logs,
        lengths,
        num_tokens,
        splits,
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        BLOCK_N=config["BLOCK_N"],
        NUM_SPLITS=config["NUM_SPLITS"],
        MIN_TOKENS=config["MIN_TOKENS"],
        SETTLED=settled,
        num_warps=4,
        **pdl_options(out),
    )
