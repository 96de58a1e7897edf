"""The shared part of the linear kernels for few tokens (1 to 16). A decode step spends most of its time here, reading
weights.

The kernels compute x [T, K] times weight [N, K] transposed. A program streams BLOCK_N rows of the weight once and
multiplies them with all tokens:

    weight [N, K]      K ───────────────►            x [T, K]: read by every program, from the L2 cache
      program 0  ░░░░│░░░░│░░░░│░░░░                 ░░░░ is BLOCK_N x BLOCK_K; several of them are in flight
      program 1  ░░░░│░░░░│░░░░│░░░░                 ░ is the slice of a tile that one warp multiplies

The weight is the left operand of the tensor cores, so a single token needs a single column. Warps divide a tile along
K, as a batch of products whose sums are added at the end. Along N a tile has 16 rows for all warps: each warp would
compute the whole product and issue four times as many dependent instructions. BLOCK_N stays below 64, because from 64
rows on Hopper uses another instruction (wgmma), which sums in another order. Below 64 the products are batch-invariant.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..language import INTERPRETED, cast, dot, round_to
from . import tuning

MAX_TOKENS = 16  # with more tokens, torch's matrix product is as fast
IN_FLIGHT = 65536  # bytes of weight in flight for each program: more than bandwidth x latency of a multiprocessor
MAX_HIDDEN = 32768  # the norm keeps a row in a program's registers


for _op in ("linear", "norm_linear", "norm_qkv_rope", "norm_swiglu_linear", "lm_head"):
    tuning.SPACES[_op] = {
        "BLOCK_N": (16, 32),  # below 64, for batch invariance
        "BLOCK_K": (128, 256, 512, 1024),
        "SPLIT_K": (1, 2, 4, 8) if _op in ("linear", "norm_linear") else (1,),
        "PREFETCH_LINES": (0, 8, 16, 32, 64),
        "num_warps": (2, 4, 8),
        "num_stages": (2, 3, 4, 5, 6, 8),
    }


@tuning.remember
def config(
    op: str,
    device: tuning.Device,
    n: int,
    k: int,
    tokens: int,
    itemsize: int,
    streams: int = 1,
    splits_k: bool = True,
) -> dict[str, Any]:
    """The configuration of a linear kernel. ``streams`` is 2 if a program reads rows of two matrices (gate and up),
    else 1. ``splits_k`` says whether several programs may divide a row (SPLIT_K).

    SPLIT_K, BLOCK_K and num_warps determine the order of summation. For batch invariance they do not depend on the
    number of tokens."""
    wide = 1024 // itemsize
    shapes = [(32, wide), (32, wide // 2)]
    if streams == 1 and n < 64 * device.num_sms:  # with 32 rows there would be too few programs
        shapes = [(16, wide), *shapes]  # narrower tiles cause bank conflicts between rows of a slice
    for block_n, block_k in shapes:
        programs = triton.cdiv(n, block_n)
        split_k = max(1, min(round(device.num_sms / programs), 8, k // 1024)) if splits_k else 1
        neighbours = min(2, triton.cdiv(programs * split_k, device.num_sms))  # programs on one multiprocessor
        memory = device.shared_memory // neighbours - 4096
        if 2 * (streams * block_n + MAX_TOKENS) * block_k * itemsize <= memory:  # at least two tiles fit
            break
    tiles = min(
        memory // ((streams * block_n + tokens) * block_k * itemsize),
        IN_FLIGHT // (streams * block_n * block_k * itemsize),
    )
    heuristic = {
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "SPLIT_K": split_k,
        "PREFETCH_LINES": 0 if device.backend != "cuda" or INTERPRETED else 4 * block_k * itemsize // 128,
        "num_warps": 4,
        "num_stages": 1 + max(1, tiles),
    }
    # tuned tiles are for 2-byte values; 4-byte ones would not fit
    return tuning.lookup(op, device, {"n": n, "k": k}, heuristic) if itemsize == 2 else heuristic


def padded(tokens: int, device: tuning.Device) -> int:
    """The number of columns of the products. AMD's matrix instructions need at least 16."""
    return triton.next_power_of_2(tokens) if device.backend == "cuda" else MAX_TOKENS


@triton.jit
def row_scales(
    x_ptr,  # [T, K]
    num_tokens,
    k_size,
    x_stride,
    eps,
    BLOCK_T: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
):
    """1 / sqrt(mean(x^2) + eps) of each token: [BLOCK_T]. The loop handles one token at a time, so the order of its sum
    does not depend on the batch."""
    tokens = tl.arange(0, BLOCK_T)
    k = tl.arange(0, BLOCK_ROW)
    mask = k < k_size
    scales = tl.zeros([BLOCK_T], tl.float32)
    x = tl.load(x_ptr + k, mask=mask, other=0.0)
    for token in range(0, num_tokens):
        wide = x.to(tl.float32)
        if BLOCK_T > 1:  # load the next row while this one is summed; the last is loaded twice
            following = tl.minimum(token + 1, num_tokens - 1)
            x = tl.load(x_ptr + following * x_stride + k, mask=mask, other=0.0)
        scale = tl.rsqrt(tl.sum(wide * wide) / k_size + eps)
        scales = tl.where(tokens == token, scale, scales)
    return scales


@triton.jit
def accumulate(
    x_ptr,  # [T, K]
    norm_weight_ptr,  # [K], or None: x is not normalised
    scales,  # [BLOCK_T], of the norm
    weight,  # [N, K], the named tuple of its format
    up,  # [N, K], used with GATED
    rows,  # [BLOCK_N] int64, all within N
    num_tokens,
    k_start,
    k_end,
    x_stride,
    LOAD: tl.constexpr,  # of the weight's format
    GATED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr,  # of BLOCK_K, one a warp
    EVEN_K: tl.constexpr,
):
    """The products of some rows of the weight with the (normalised) tokens, [BLOCK_N, BLOCK_T] float32, and with GATED
    those of the same rows of up; without GATED the second result is zero. A tile is [SLICES, rows, BLOCK_K /
    SLICES]."""
    dtype = x_ptr.dtype.element_ty
    # Columns beyond the last token read the last token again; their results are not stored.
    tokens = tl.minimum(tl.arange(0, BLOCK_T), num_tokens - 1)[None, :, None]
    rows = rows[None, :, None]
    width: tl.constexpr = BLOCK_K // SLICES
    tile_k = tl.arange(0, SLICES)[:, None, None] * width + tl.arange(0, width)[None, None, :]
    acc = tl.zeros([SLICES, BLOCK_N, BLOCK_T], tl.float32)
    acc_up = tl.zeros([SLICES, BLOCK_N, BLOCK_T], tl.float32)
    for block in range(k_start, k_end, BLOCK_K):
        k = block + tile_k
        mask = None if EVEN_K else k < k_end
        other = None if EVEN_K else 0.0
        x = tl.load(x_ptr + tokens * x_stride + k, mask=mask, other=other)
        if norm_weight_ptr is not None:
            norm_weight = tl.load(norm_weight_ptr + k, mask=mask, other=other).to(tl.float32)
            x = cast(round_to(x.to(tl.float32) * scales[None, :, None], dtype) * norm_weight, dtype)
        acc = dot(LOAD(weight, rows, k, mask, other), tl.permute(x, [0, 2, 1]), acc)
        if GATED:
            acc_up = dot(LOAD(up, rows, k, mask, other), tl.permute(x, [0, 2, 1]), acc_up)
    return tl.sum(acc, axis=0), tl.sum(acc_up, axis=0)
