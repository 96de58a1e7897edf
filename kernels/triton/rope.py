"""Rotary position embedding of q and k, and the write of k and v into the paged cache, in one launch.

    rotated[i]         = round(x[i] * cos[i] - x[i + D/2] * sin[i])         i < D/2, half-split as in Qwen2
    rotated[i + D/2]   = round(x[i + D/2] * cos[i] + x[i] * sin[i])

qkv is [T, (Hq + 2 Hkv) D] with any row stride, its heads in the order q, k, v. cos_sin [context, D] is float32, with
cosines in the first half of a row. Products and sums are float32 and are rounded once. v is copied. Rotation by the
negative angle is the inverse, and computes the gradient. Bytes moved: 2 T (Hq + 2 Hkv) D elements, and 4 T D bytes of
the table.

    program (t, p):  heads p * HEADS .. of token t; q goes to its output, k and v into the slot of the token
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..language import cast, wait_for_inputs
from ..pages import DensePages, Pages
from ..rope import split_heads
from . import tuning
from .backend import TRITON, pdl_options, refuses_format
from .launching import cdiv, next_power_of_2, planned

HEAD_DIMS = (16, 32, 64, 128)


tuning.SPACES["rope_and_cache"] = {"HEADS": (1, 2, 4, 8, 16, 32), "num_warps": (1, 2, 4, 8)}


@tuning.remember
def _config(device: tuning.Device, tokens: int, heads: int, head_dim: int) -> dict[str, Any]:
    """A program takes all heads of a token, or fewer if there are not enough tokens to fill the GPU."""
    together, least = next_power_of_2(heads), max(4, 512 // head_dim)  # 512 elements fill a warp's 128-bit loads
    while together > least and (tokens * cdiv(heads, together) < 2 * device.num_sms or together * head_dim > 4096):
        together //= 2
    heuristic = {"HEADS": together, "num_warps": max(1, together * head_dim // 1024)}
    return tuning.lookup("rope_and_cache", device, {"tokens": tokens, "heads": heads}, heuristic)


@planned
@triton.jit
def _rope_kernel(
    q_out_ptr,  # [T, Hq, D]
    pages,  # the named tuple of their format; if there are no slots, row t of k_out is slot t
    q_ptr,  # [T, Hq, D]
    k_ptr,  # [T, Hkv, D]
    v_ptr,  # [T, Hkv, D], or None: there is no v
    positions_ptr,  # [T]
    cos_sin_ptr,  # [context, D] float32
    slots_ptr,  # [T], or None: k of token t goes to row t
    num_q_heads,
    num_kv_heads,
    q_stride,  # of a token; heads are dense
    k_stride,
    STORE_K: tl.constexpr,  # of the pages' format
    STORE_V: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr,
    INVERSE: tl.constexpr,
    PDL: tl.constexpr,
):
    HALF: tl.constexpr = HEAD_DIM // 2
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    # Broadcast, so that the loads of the table have the layout of the loads of q.
    column = tl.broadcast_to(tl.arange(0, HALF)[None, :], [HEADS, HALF])
    dtype = q_ptr.dtype.element_ty

    wait_for_inputs(PDL)
    position = tl.load(positions_ptr + token).to(tl.int64)
    cos = tl.load(cos_sin_ptr + position * HEAD_DIM + column)
    sin = tl.load(cos_sin_ptr + position * HEAD_DIM + HALF + column)
    if INVERSE:
        sin = -sin
    slot = token
    if slots_ptr is not None:
        slot = tl.load(slots_ptr + token).to(tl.int64)

    # Choose between q and k after loading: AMD's compiler cannot select between pointers.
    is_q = heads < num_q_heads
    k_heads = heads - num_q_heads
    is_k = (k_heads >= 0) & (k_heads < num_kv_heads)
    q_from = q_ptr + token * q_stride + heads * HEAD_DIM + column
    k_from = k_ptr + token * k_stride + k_heads * HEAD_DIM + column
    first = tl.where(is_q, tl.load(q_from, mask=is_q), tl.load(k_from, mask=is_k)).to(tl.float32)
    second = tl.where(is_q, tl.load(q_from + HALF, mask=is_q), tl.load(k_from + HALF, mask=is_k)).to(tl.float32)
    if v_ptr is not None:  # load v before the first store, so that all loads are in flight together
        v_heads = k_heads - num_kv_heads
        is_v = (v_heads >= 0) & (v_heads < num_kv_heads)
        v_from = v_ptr + token * k_stride + v_heads * HEAD_DIM + column
        v_first = tl.load(v_from, mask=is_v)
        v_second = tl.load(v_from + HALF, mask=is_v)

    low = cast(first * cos - second * sin, dtype)
    high = cast(second * cos + first * sin, dtype)

    q_to = q_out_ptr + (token * num_q_heads + heads) * HEAD_DIM + column
    tl.store(q_to, low, mask=is_q)
    tl.store(q_to + HALF, high, mask=is_q)
    STORE_K(pages, slot, k_heads, num_kv_heads, column, low, high, is_k, HEAD_DIM)
    if v_ptr is not None:
        STORE_V(pages, slot, v_heads, num_kv_heads, column, v_first, v_second, is_v, HEAD_DIM)


def _launch_rope(
    q_out: Tensor,
    pages: Pages,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    positions: Tensor,
    cos_sin: Tensor,
    slots: Tensor | None,
    inverse: bool = False,
) -> None:
    """q is [T, Hq, D]; k and v are [T, Hkv, D]. The heads of a token are dense. q_out is dense."""
    (num_tokens, num_q_heads, head_dim), num_kv_heads = q.shape, k.shape[1]
    heads = num_q_heads + (1 if v is None else 2) * num_kv_heads
    config = _config(tuning.device_of(q), num_tokens, heads, head_dim)
    _rope_kernel[(num_tokens, cdiv(heads, config["HEADS"]))](
        q_out,
        pages.triton_arguments(),
        q,
        k,
        v,
        positions,
        cos_sin,
        slots,
        num_q_heads,
        num_kv_heads,
        q.stride(0),
        k.stride(0),
        STORE_K=pages.triton_store_k,
        STORE_V=pages.triton_store_v,
        HEAD_DIM=head_dim,
        INVERSE=inverse,
        **config,
        **pdl_options(q),
    )


def _refuses_heads(head_dim: int) -> str | None:
    return None if head_dim in HEAD_DIMS else f"heads of {head_dim} (16, 32, 64 or 128)"


def refuses_pages(pages: Pages) -> str | None:
    """The reason why the kernel does not store k and v to pages of this format, or None."""
    if reason := refuses_format("pages", pages, pages.triton_store_k):
        return reason
    return _refuses_heads(pages.head_dim)


def _dense_heads(x: Tensor) -> Tensor:
    return x if x.stride(1) == x.shape[2] else x.contiguous()


@TRITON.implements(lambda q, *rest, **keywords: _refuses_heads(q.shape[2]))
def apply_rope(
    q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    q, k = _dense_heads(q), _dense_heads(k)
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    rows = k_out[:, None]  # each token is a page of one slot
    _launch_rope(q_out, DensePages(rows, rows), q, k, None, positions, cos_sin, None, inverse)
    return q_out, k_out


@TRITON.implements(lambda qkv, positions, cos_sin, pages, slots: refuses_pages(pages))
def rope_and_cache(qkv: Tensor, positions: Tensor, cos_sin: Tensor, pages: Pages, slots: Tensor) -> Tensor:
    q, k, v = split_heads(qkv, pages)
    q_out = q.new_empty(q.shape)
    _launch_rope(q_out, pages, q, k, v, positions, cos_sin, slots)
    return q_out
