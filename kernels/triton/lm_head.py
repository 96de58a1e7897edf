"""The last norm and the product with the vocabulary, for the last token of each sequence.

    lm_head        logits = rms_norm(x) W', in float32, not rounded again
    lm_head_top_k  the k largest logits and their ids; the logits are not written

x is [T, K], W is [V, K]. Bytes moved: the weight, T K elements of x, and 4 T V bytes of logits; the top k writes only
its candidates. Up to 16 tokens run as few_tokens.py describes. For the top k, each tile keeps the k best of
its rows as candidates, and a second kernel finds the k best candidates:

    tile 0 [BLOCK_N rows] ─► k candidates ─┐
    tile 1 [BLOCK_N rows] ─► k candidates ─┼─► one program a token ─► k best
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..language import wait_for_inputs
from ..rms_norm import rms_norm
from ..weights import Stack, Weight
from .backend import TRITON, pdl_options
from .few_tokens import MAX_TOKENS, multiply, reads_nothing
from .launching import cdiv, next_power_of_2, planned
from .linear import refuses_norm
from .many_tokens import few_enough, product, slices
from .tiling import tiling

MAX_TOP_K = 16  # for a larger k, the kernel computes the logits and torch sorts them


class HeadArguments(NamedTuple):
    logits: Any  # [T, V] float32, or None
    candidates: Any  # [T, C, TOP_K] float32, or None; C tiles or more
    candidate_ids: Any  # [T, C, TOP_K] int32, or None
    num_candidates: Any  # C
    vocabulary: Any


# The functions that few_tokens.multiply calls get a tuple: HeadArguments, TOP_K.


@triton.jit
def _rows(args, tile, places, BLOCK_N: tl.constexpr):
    return tl.minimum(tl.cast(tile, tl.int64) * BLOCK_N + places, args[0].vocabulary - 1)


@triton.jit
def _store_logits(args, tile, logits, inputs, tokens, num_tokens):
    head = args[0]
    ids = (tl.arange(0, logits.shape[0]) + tile * logits.shape[0])[:, None]
    at = tokens.to(tl.int64)[None, :] * head.vocabulary + ids
    tl.store(head.logits + at, logits, mask=(tokens < num_tokens)[None, :] & (ids < head.vocabulary))


@triton.jit
def _store_candidates(args, tile, logits, inputs, tokens, num_tokens):
    head = args[0]
    TOP_K: tl.constexpr = args[1]
    ids = (tl.arange(0, logits.shape[0]) + tile * logits.shape[0])[:, None]
    logits = tl.where(logits != logits, float("inf"), logits)  # tl.max would skip NaN
    logits = tl.where(ids < head.vocabulary, logits, float("-inf"))
    ids = tl.broadcast_to(ids, [logits.shape[0], logits.shape[1]])
    at = (tokens * head.num_candidates + tile) * TOP_K
    for place in tl.static_range(TOP_K):
        best = tl.max(logits, axis=0)
        best_id = tl.min(tl.where(logits == best[None, :], ids, 0x7FFFFFFF), axis=0)
        tl.store(head.candidates + at + place, best, mask=tokens < num_tokens)
        tl.store(head.candidate_ids + at + place, best_id, mask=tokens < num_tokens)
        # Exclude the taken row: it now sorts last, even after the rows beyond the vocabulary.
        ids = tl.where(ids == best_id[None, :], 0x7FFFFFFF, ids)
        logits = tl.where(ids == 0x7FFFFFFF, float("-inf"), logits)


@planned
@triton.jit
def _lm_head_kernel(
    args,  # HeadArguments
    x_ptr,  # [T, K]
    norm_weight_ptr,  # [K]
    weight,  # [V, K], the named tuple of its format
    num_tokens,
    num_tiles,
    k_size,
    x_stride,
    eps,
    LOAD: tl.constexpr,  # this and the next five are of the weight's format
    LOAD_GROUPS: tl.constexpr,
    OPERAND: tl.constexpr,
    MULTIPLY: tl.constexpr,
    PREFETCH: tl.constexpr,
    FORM: tl.constexpr,
    TOP_K: tl.constexpr,  # 0: all logits
    BLOCK_T: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    AHEAD: tl.constexpr,
    SPLIT_K: tl.constexpr,
    SLICES: tl.constexpr,
    EVEN_K: tl.constexpr,
    RESIDENT: tl.constexpr,
    LOOPS: tl.constexpr,
    PREFETCH_LINES: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    tl.static_assert(SPLIT_K == 1)
    epilogue: tl.constexpr = _store_candidates if TOP_K > 0 else _store_logits
    multiply(
        (args, TOP_K), x_ptr, norm_weight_ptr, weight, None, None, num_tokens, num_tiles, k_size, x_stride, eps, LOAD,
        LOAD_GROUPS, OPERAND, MULTIPLY, PREFETCH, FORM, _rows, reads_nothing, epilogue, BLOCK_T, BLOCK_ROW, BLOCK_N,
        BLOCK_K, AHEAD, SPLIT_K, SLICES, EVEN_K, RESIDENT, LOOPS, PREFETCH_LINES, STAGES, PDL,
    )  # fmt: skip


@planned
@triton.jit
def _top_k_kernel(
    values_ptr,  # [T, TOP_K] float32
    ids_ptr,  # [T, TOP_K] int64
    candidates_ptr,  # [T, C] float32
    candidate_ids_ptr,  # [T, C] int32
    num_candidates,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Sorts by descending logit; of equal logits the lower id comes first. Each place gets the best candidate that
    comes after the candidate of the previous place."""
    token = tl.program_id(0)
    wait_for_inputs(PDL)
    value = float("inf")
    taken = -1
    for place in tl.static_range(TOP_K):
        best = tl.full([BLOCK], float("-inf"), tl.float32)
        best_id = tl.full([BLOCK], 0x7FFFFFFF, tl.int32)
        for start in range(0, num_candidates, BLOCK):
            at = start + tl.arange(0, BLOCK)
            mask = at < num_candidates
            found = tl.load(candidates_ptr + token * num_candidates + at, mask=mask, other=float("-inf"))
            found_id = tl.load(candidate_ids_ptr + token * num_candidates + at, mask=mask, other=0x7FFFFFFF)
            left = (found < value) | ((found == value) & (found_id > taken))
            better = left & ((found > best) | ((found == best) & (found_id < best_id)))
            best = tl.where(better, found, best)
            best_id = tl.where(better, found_id, best_id)
        value = tl.max(best, axis=0)
        taken = tl.min(tl.where(best == value, best_id, 0x7FFFFFFF), axis=0)
        tl.store(values_ptr + token * TOP_K + place, value)
        # If fewer than TOP_K logits are above -inf, no id is left. Then 0 is stored, which is a valid row of the table.
        tl.store(ids_ptr + token * TOP_K + place, tl.where(taken == 0x7FFFFFFF, 0, taken).to(tl.int64))


def _launch_lm_head(
    logits: Tensor | None,
    candidates: Tensor | None,
    candidate_ids: Tensor | None,
    x: Tensor,
    norm_weight: Tensor,
    weight: Weight,
    eps: float,
) -> None:
    num_tokens, k_size = x.shape
    tiles, programs, constants = tiling("lm_head", x, weight)
    num_candidates, top_k = (0, 0) if candidates is None else candidates.shape[1:]
    tiles = max(tiles, num_candidates)
    grid = programs if constants["RESIDENT"] else tiles
    _lm_head_kernel[(grid,)](
        HeadArguments(logits, candidates, candidate_ids, num_candidates, len(weight)),
        x,
        norm_weight,
        weight.triton_arguments(),
        num_tokens,
        tiles,
        k_size,
        x.stride(0),
        eps,
        TOP_K=top_k,
        **constants | {"LOOPS": grid < tiles},
    )


def _launch_top_k(values: Tensor, ids: Tensor, candidates: Tensor, candidate_ids: Tensor) -> None:
    num_tokens, tiles, k = candidates.shape
    block = min(8192, next_power_of_2(tiles * k))
    _top_k_kernel[(num_tokens,)](
        values, ids, candidates, candidate_ids, tiles * k, TOP_K=k, BLOCK=block, num_warps=8, **pdl_options(candidates)
    )


@TRITON.implements(lambda x, norm_weight, eps, weight: refuses_norm(x, weight))
def lm_head(x: Tensor, norm_weight: Tensor, eps: float, weight: Weight) -> Tensor:
    if not few_enough(x, weight):
        return product(rms_norm(x, norm_weight, eps), weight).float()
    if isinstance(weight, Stack):
        return torch.cat([lm_head(x, norm_weight, eps, part) for part in weight.parts], dim=1)
    logits = x.new_empty(len(x), len(weight), dtype=torch.float32)
    for x_slice, logits_slice in slices(x, logits):
        _launch_lm_head(logits_slice, None, None, x_slice, norm_weight, weight, eps)
    return logits


@TRITON.implements(lambda x, norm_weight, eps, weight, k: refuses_norm(x, weight))
def lm_head_top_k(x: Tensor, norm_weight: Tensor, eps: float, weight: Weight, k: int) -> tuple[Tensor, Tensor]:
    many = not few_enough(x, weight)
    if many and k == 1:
        values, ids = lm_head(x, norm_weight, eps, weight).max(dim=-1, keepdim=True)
        return values, ids
    if many or k > MAX_TOP_K or isinstance(weight, Stack):
        values, ids = lm_head(x, norm_weight, eps, weight).sort(dim=-1, descending=True, stable=True)
        return values[:, :k], ids[:, :k]
    values = x.new_empty(len(x), k, dtype=torch.float32)
    ids = x.new_empty(len(x), k, dtype=torch.int64)
    # A multiple of 16 lets the second kernel load vectors. The extra tiles have no rows.
    tiles = cdiv(tiling("lm_head", x[:MAX_TOKENS] if len(x) > MAX_TOKENS else x, weight)[0], 16) * 16
    candidates = x.new_empty(len(x), tiles, k, dtype=torch.float32)
    candidate_ids = torch.empty_like(candidates, dtype=torch.int32)
    for x_slice, mine, mine_ids in slices(x, candidates, candidate_ids):
        _launch_lm_head(None, mine, mine_ids, x_slice, norm_weight, weight, eps)
    _launch_top_k(values, ids, candidates, candidate_ids)
    return values, ids
