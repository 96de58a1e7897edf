"""The last norm and the product with the vocabulary, for the last token of each sequence.

    lm_head        logits = rms_norm(residual + x) W', in float32, not rounded again
    lm_head_top_k  the k largest logits and their ids; the logits are not written

x is [T, K], W is [V, K]. Bytes moved: the weight, T K elements of x and residual, and 4 T V bytes of logits; the top k
writes only its candidates. Up to 16 tokens run as few_tokens.py describes. For the top k, each program keeps the k best
of its rows as candidates, and a second kernel finds the k best candidates:

    tile 0 [BLOCK_N rows] ─► k candidates ─┐
    tile 1 [BLOCK_N rows] ─► k candidates ─┼─► one program a token ─► k best
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..language import wait_for_inputs
from ..rms_norm import add_rms_norm
from ..weights import Weight
from . import tuning
from .backend import TRITON, pdl_options
from .few_tokens import MAX_TOKENS, accumulate, config, padded, row_scales
from .launching import planned
from .linear import refuses_norm

MAX_TOP_K = 16  # for a larger k the logits are computed, and torch sorts them


@planned
@triton.jit
def _lm_head_kernel(
    logits_ptr,  # [T, V] float32, or None
    candidates_ptr,  # [T, tiles, TOP_K] float32, or None
    candidate_ids_ptr,  # [T, tiles, TOP_K] int32, or None
    x_ptr,  # [T, K]
    residual_ptr,  # [T, K], or None
    norm_weight_ptr,  # [K]
    weight,  # [V, K], the named tuple of its format
    num_tokens,
    vocabulary,
    k_size,
    x_stride,
    residual_stride,
    eps,
    LOAD: tl.constexpr,  # of the weight's format
    PREFETCH: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    PREFETCH_LINES: tl.constexpr,
    PDL: tl.constexpr,
):
    tl.static_assert(SPLIT_K == 1)
    tile = tl.program_id(0)
    ids = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(ids, vocabulary - 1).to(tl.int64)
    PREFETCH(weight, rows, 0, k_size, PREFETCH_LINES)

    wait_for_inputs(PDL)
    scales = row_scales(
        None, x_ptr, residual_ptr, num_tokens, k_size, 0, x_stride, residual_stride, eps, 0, 1, BLOCK_T, BLOCK_ROW
    )
    logits, _ = accumulate(
        x_ptr, residual_ptr, norm_weight_ptr, scales, weight, weight, rows, num_tokens, 0, k_size,
        x_stride, residual_stride, LOAD, False, BLOCK_T, BLOCK_N, BLOCK_K, SLICES, EVEN_K,
    )  # fmt: skip

    tokens = tl.arange(0, BLOCK_T)
    ids = ids[:, None]
    if candidates_ptr is None:
        at = tokens.to(tl.int64)[None, :] * vocabulary + ids
        tl.store(logits_ptr + at, logits, mask=(tokens < num_tokens)[None, :] & (ids < vocabulary))
    else:
        logits = tl.where(logits != logits, float("inf"), logits)  # tl.max would skip NaN
        logits = tl.where(ids < vocabulary, logits, float("-inf"))
        ids = tl.broadcast_to(ids, [BLOCK_N, BLOCK_T])
        at = (tokens * tl.num_programs(0) + tile) * TOP_K
        for place in tl.static_range(TOP_K):
            best = tl.max(logits, axis=0)
            best_id = tl.min(tl.where(logits == best[None, :], ids, 0x7FFFFFFF), axis=0)
            tl.store(candidates_ptr + at + place, best, mask=tokens < num_tokens)
            tl.store(candidate_ids_ptr + at + place, best_id, mask=tokens < num_tokens)
            # Exclude the taken row: it comes after everything, even after the rows beyond the vocabulary.
            ids = tl.where(ids == best_id[None, :], 0x7FFFFFFF, ids)
            logits = tl.where(ids == 0x7FFFFFFF, float("-inf"), logits)


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
    """Sorts by descending logit; of equal logits the lower id comes first. Each place takes the best candidate that
    comes after the candidate of the place before."""
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
        # With fewer than TOP_K logits above -inf no id is left. Then 0 is stored, which is a valid row of the table.
        tl.store(ids_ptr + token * TOP_K + place, tl.where(taken == 0x7FFFFFFF, 0, taken).to(tl.int64))


def _launch_lm_head(
    logits: Tensor | None,
    candidates: Tensor | None,
    candidate_ids: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    weight: Weight,
    eps: float,
) -> None:
    (num_tokens, k_size), vocabulary = x.shape, len(weight)
    chosen = _config(x, weight)
    tiles = triton.cdiv(vocabulary, chosen["BLOCK_N"]) if candidates is None else candidates.shape[1]
    _lm_head_kernel[(tiles,)](
        logits,
        candidates,
        candidate_ids,
        x,
        residual,
        norm_weight,
        weight.triton_arguments(),
        num_tokens,
        vocabulary,
        k_size,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        eps,
        LOAD=weight.triton_load,
        PREFETCH=weight.triton_prefetch,
        TOP_K=0 if candidates is None else candidates.shape[2],
        BLOCK_T=padded(num_tokens, tuning.device_of(x)),
        BLOCK_ROW=triton.next_power_of_2(k_size),
        SLICES=chosen["num_warps"],
        EVEN_K=k_size % chosen["BLOCK_K"] == 0,
        **chosen,
        **pdl_options(x),
    )


def _launch_top_k(values: Tensor, ids: Tensor, candidates: Tensor, candidate_ids: Tensor) -> None:
    num_tokens, tiles, k = candidates.shape
    block = min(8192, triton.next_power_of_2(tiles * k))
    _top_k_kernel[(num_tokens,)](
        values, ids, candidates, candidate_ids, tiles * k, TOP_K=k, BLOCK=block, num_warps=8, **pdl_options(candidates)
    )


def _config(x: Tensor, weight: Weight) -> dict[str, int]:
    device = tuning.device_of(x)
    return config("lm_head", device, len(weight), x.shape[1], padded(len(x), device), x.element_size(), splits_k=False)


@TRITON.implements(lambda x, residual, norm_weight, eps, weight: refuses_norm(x, weight))
def lm_head(x: Tensor, residual: Tensor | None, norm_weight: Tensor, eps: float, weight: Weight) -> Tensor:
    if len(x) > MAX_TOKENS:
        return F.linear(add_rms_norm(x, residual, norm_weight, eps)[0], weight.dequantise()).float()
    logits = x.new_empty(len(x), len(weight), dtype=torch.float32)
    _launch_lm_head(logits, None, None, x, residual, norm_weight, weight, eps)
    return logits


@TRITON.implements(lambda x, residual, norm_weight, eps, weight, k: refuses_norm(x, weight))
def lm_head_top_k(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor, eps: float, weight: Weight, k: int
) -> tuple[Tensor, Tensor]:
    if len(x) > MAX_TOKENS and k == 1:
        values, ids = lm_head(x, residual, norm_weight, eps, weight).max(dim=-1, keepdim=True)
        return values, ids
    if len(x) > MAX_TOKENS or k > MAX_TOP_K:
        values, ids = lm_head(x, residual, norm_weight, eps, weight).sort(dim=-1, descending=True, stable=True)
        return values[:, :k], ids[:, :k]
    values = x.new_empty(len(x), k, dtype=torch.float32)
    ids = x.new_empty(len(x), k, dtype=torch.int64)
    # A multiple of 16 lets the second kernel load vectors. The extra tiles have no rows.
    tiles = triton.cdiv(len(weight), 16 * _config(x, weight)["BLOCK_N"]) * 16
    candidates = x.new_empty(len(x), tiles, k, dtype=torch.float32)
    candidate_ids = torch.empty_like(candidates, dtype=torch.int32)
    _launch_lm_head(None, candidates, candidate_ids, x, residual, norm_weight, weight, eps)
    _launch_top_k(values, ids, candidates, candidate_ids)
    return values, ids
