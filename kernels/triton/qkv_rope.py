"""The ops of a layer before its attention, in one launch: add, norm, q k v, rotary embedding, write into the cache.

    residual' = round(residual + x);  qkv = round(rms_norm(residual') W' + bias);  then as rope_and_cache (rope.py)

x is [T, K]. W is [N, K] with N = (Hq + 2 Hkv) D, its heads in the order q, k, v. Values are rounded where norm_linear
and rope_and_cache round them. Bytes moved: the weight, T K elements of x, residual and residual', T N of q, k and v. Up
to 16 tokens run in one kernel, which streams the weight as few_tokens.py describes. More tokens run norm_linear and
then rope_and_cache.

A rotation needs elements i and i + D/2 of a head, so a program takes BLOCK_N / 2 rows of each half:

    weight of a head [D, K]     ░░ program 0   ▒▒ program 1 ...   │   ░░ program 0   ▒▒ program 1 ...
                                0                                D/2                               D
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..language import cast, round_to, wait_for_inputs
from ..linear import norm_linear
from ..pages import Pages
from ..rope import rope_and_cache
from ..weights import Weight
from . import tuning
from .backend import TRITON, pdl_options
from .few_tokens import MAX_TOKENS, accumulate, config, padded, row_scales
from .launching import planned
from .linear import new_residual_like, refuses_norm
from .rope import refuses_pages


@planned
@triton.jit
def _norm_qkv_rope_kernel(
    q_out_ptr,  # [T, Hq, D]
    pages,  # the named tuple of their format; the kernel writes k and v there
    new_residual_ptr,  # [T, K], or None
    x_ptr,  # [T, K]
    residual_ptr,  # [T, K], added before the norm, or None
    norm_weight_ptr,  # [K]
    weight,  # [N, K], the named tuple of its format
    bias_ptr,  # [N], or None
    positions_ptr,  # [T]
    cos_sin_ptr,  # [context, D] float32
    slots_ptr,  # [T]
    num_tokens,
    num_q_heads,
    num_kv_heads,
    k_size,
    new_residual_stride,
    x_stride,
    residual_stride,
    eps,
    LOAD: tl.constexpr,  # of the weight's format
    PREFETCH: tl.constexpr,
    STORE_K: tl.constexpr,  # of the pages' format
    STORE_V: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr,
    EVEN_K: tl.constexpr,
    PREFETCH_LINES: tl.constexpr,
    PDL: tl.constexpr,
):
    HALF: tl.constexpr = HEAD_DIM // 2
    PAIRS: tl.constexpr = BLOCK_N // 2
    tile = tl.program_id(0)
    head = tile // (HALF // PAIRS)
    first = tile % (HALF // PAIRS) * PAIRS
    local = tl.arange(0, BLOCK_N)
    rows = head.to(tl.int64) * HEAD_DIM + first + local % PAIRS + local // PAIRS * HALF
    PREFETCH(weight, rows, 0, k_size, PREFETCH_LINES)

    wait_for_inputs(PDL)
    scales = row_scales(
        new_residual_ptr, x_ptr, residual_ptr, num_tokens, k_size, new_residual_stride, x_stride, residual_stride,
        eps, tile, tl.num_programs(0), BLOCK_T, BLOCK_ROW,
    )  # fmt: skip
    acc, _ = accumulate(
        x_ptr, residual_ptr, norm_weight_ptr, scales, weight, weight, rows, num_tokens, 0, k_size,
        x_stride, residual_stride, LOAD, False, BLOCK_T, BLOCK_N, BLOCK_K, SLICES, EVEN_K,
    )  # fmt: skip
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + rows).to(tl.float32)[:, None]

    dtype = x_ptr.dtype.element_ty
    low, high = tl.split(tl.permute(tl.reshape(round_to(acc, dtype), [2, PAIRS, BLOCK_T]), [1, 2, 0]))
    tokens = tl.arange(0, BLOCK_T)[None, :]
    mask = tl.broadcast_to(tokens < num_tokens, [PAIRS, BLOCK_T])
    column = first + tl.arange(0, PAIRS)[:, None]
    position = tl.load(positions_ptr + tokens, mask=tokens < num_tokens, other=0).to(tl.int64)
    cos = tl.load(cos_sin_ptr + position * HEAD_DIM + column, mask=mask, other=0.0)
    sin = tl.load(cos_sin_ptr + position * HEAD_DIM + HALF + column, mask=mask, other=0.0)
    is_v = head >= num_q_heads + num_kv_heads
    first_half = cast(tl.where(is_v, low, low * cos - high * sin), dtype)
    second_half = cast(tl.where(is_v, high, high * cos + low * sin), dtype)

    slot = tl.load(slots_ptr + tokens, mask=tokens < num_tokens, other=0).to(tl.int64)
    k_head = head - num_q_heads
    if k_head < 0:
        to = q_out_ptr + (tokens.to(tl.int64) * num_q_heads + head) * HEAD_DIM + column
        tl.store(to, first_half, mask=mask)
        tl.store(to + HALF, second_half, mask=mask)
    elif k_head < num_kv_heads:
        STORE_K(pages, slot, k_head, num_kv_heads, column, first_half, mask, HEAD_DIM)
        STORE_K(pages, slot, k_head, num_kv_heads, column + HALF, second_half, mask, HEAD_DIM)
    else:
        STORE_V(pages, slot, k_head - num_kv_heads, num_kv_heads, column, first_half, mask, HEAD_DIM)
        STORE_V(pages, slot, k_head - num_kv_heads, num_kv_heads, column + HALF, second_half, mask, HEAD_DIM)


def _launch_norm_qkv_rope(
    q_out: Tensor,
    pages: Pages,
    new_residual: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    weight: Weight,
    bias: Tensor | None,
    positions: Tensor,
    cos_sin: Tensor,
    slots: Tensor,
    eps: float,
) -> None:
    (num_tokens, k_size), (_, num_q_heads, head_dim) = x.shape, q_out.shape
    device = tuning.device_of(x)
    block_t = padded(num_tokens, device)
    chosen = config("norm_qkv_rope", device, len(weight), k_size, block_t, x.element_size(), splits_k=False)
    block_n = min(chosen["BLOCK_N"], head_dim)
    options = {name: value for name, value in chosen.items() if name not in ("BLOCK_N", "SPLIT_K")}
    _norm_qkv_rope_kernel[(len(weight) // block_n,)](
        q_out,
        pages.triton_arguments(),
        new_residual,
        x,
        residual,
        norm_weight,
        weight.triton_arguments(),
        bias,
        positions,
        cos_sin,
        slots,
        num_tokens,
        num_q_heads,
        pages.num_kv_heads,
        k_size,
        0 if new_residual is None else new_residual.stride(0),
        x.stride(0),
        0 if residual is None else residual.stride(0),
        eps,
        LOAD=weight.triton_load,
        PREFETCH=weight.triton_prefetch,
        STORE_K=pages.triton_store_k,
        STORE_V=pages.triton_store_v,
        HEAD_DIM=head_dim,
        BLOCK_T=block_t,
        BLOCK_ROW=triton.next_power_of_2(k_size),
        BLOCK_N=block_n,
        SLICES=chosen["num_warps"],
        EVEN_K=k_size % chosen["BLOCK_K"] == 0,
        **options,
        **pdl_options(x),
    )


@TRITON.implements()
def norm_qkv_rope(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    weight: Weight,
    bias: Tensor | None,
    positions: Tensor,
    cos_sin: Tensor,
    pages: Pages,
    slots: Tensor,
) -> tuple[Tensor, Tensor]:
    """Runs one kernel if it takes the arguments, else norm_linear and rope_and_cache."""
    if len(x) > MAX_TOKENS or refuses_norm(x, weight) or refuses_pages(pages):
        qkv, residual = norm_linear(x, residual, norm_weight, eps, weight, bias)
        return rope_and_cache(qkv, positions, cos_sin, pages, slots), residual
    q_out = x.new_empty(len(x), len(weight) // pages.head_dim - 2 * pages.num_kv_heads, pages.head_dim)
    new_residual = new_residual_like(x, residual)
    _launch_norm_qkv_rope(
        q_out, pages, new_residual, x, residual, norm_weight, weight, bias, positions, cos_sin, slots, eps
    )
    return q_out, x if new_residual is None else new_residual
