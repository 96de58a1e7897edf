"""Rotary position embedding of q and k, and the write of k and v into the paged cache, in one launch.

    rotated[i]         = round(x[i] * cos[i] - x[i + D/2] * sin[i])         i < D/2, half-split as in Qwen2
    rotated[i + D/2]   = round(x[i + D/2] * cos[i] + x[i] * sin[i])

qkv [T, (Hq + 2 Hkv) D] of any row stride, heads in the order q, k, v; cos_sin [context, D] float32, cosines in the
first half of a row. Products and sums in float32, rounded once; v is copied. The rotation by the negative angle is the
inverse, and the gradient. Bytes moved: 2 T (Hq + 2 Hkv) D elements, and 4 T D bytes of the table.

    program (t, p):  heads p * HEADS .. of token t; q goes to its output, k and v into the slot of the token
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import c as c_backend
from . import reference, tuning
from .checks import INTEGERS, check_cache, check_device, check_range, check_tensor
from .dispatch import op, pdl_options, runs_on_triton
from .language import cast, wait_for_inputs
from .triton_if_any import tl, triton

HEAD_DIMS = (16, 32, 64, 128)


tuning.SPACES["rope_and_cache"] = {"HEADS": (1, 2, 4, 8, 16, 32), "num_warps": (1, 2, 4, 8)}


@tuning.remember
def _config(device: tuning.Device, tokens: int, heads: int, head_dim: int) -> dict[str, Any]:
    """All heads of a token in one program, or fewer where there are not enough tokens to fill the card."""
    together, least = triton.next_power_of_2(heads), max(4, 512 // head_dim)  # of which a warp loads 128 bits a thread
    while together > least and (
        tokens * triton.cdiv(heads, together) < 2 * device.num_sms or together * head_dim > 4096
    ):
        together //= 2
    heuristic = {"HEADS": together, "num_warps": max(1, together * head_dim // 1024)}
    return tuning.lookup("rope_and_cache", device, {"tokens": tokens, "heads": heads}, heuristic)


@triton.jit
def _rope_kernel(
    q_out_ptr,  # [T, Hq, D]
    k_out_ptr,  # [T or slots, Hkv, D]
    v_out_ptr,  # [slots, Hkv, D], or None: no v
    q_ptr,  # [T, Hq, D]
    k_ptr,  # [T, Hkv, D]
    v_ptr,  # [T, Hkv, D], or None
    positions_ptr,  # [T]
    cos_sin_ptr,  # [context, D] float32
    slots_ptr,  # [T], or None: k goes to row t
    num_q_heads,
    num_kv_heads,
    q_stride,  # of a token; heads are dense
    k_stride,
    HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr,
    INVERSE: tl.constexpr,
    PDL: tl.constexpr,
):
    HALF: tl.constexpr = HEAD_DIM // 2
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    column = tl.broadcast_to(tl.arange(0, HALF)[None, :], [HEADS, HALF])  # the table, too, is then read as q is
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

    # q and k are chosen as values: AMD's compiler takes no choice between pointers
    is_q = heads < num_q_heads
    k_heads = heads - num_q_heads
    is_k = (k_heads >= 0) & (k_heads < num_kv_heads)
    q_from = q_ptr + token * q_stride + heads * HEAD_DIM + column
    k_from = k_ptr + token * k_stride + k_heads * HEAD_DIM + column
    first = tl.where(is_q, tl.load(q_from, mask=is_q), tl.load(k_from, mask=is_k)).to(tl.float32)
    second = tl.where(is_q, tl.load(q_from + HALF, mask=is_q), tl.load(k_from + HALF, mask=is_k)).to(tl.float32)
    if v_out_ptr is not None:  # loaded before the first store, so that nothing waits twice
        v_heads = k_heads - num_kv_heads
        is_v = (v_heads >= 0) & (v_heads < num_kv_heads)
        v_from = v_ptr + token * k_stride + v_heads * HEAD_DIM + column
        v_first = tl.load(v_from, mask=is_v)
        v_second = tl.load(v_from + HALF, mask=is_v)

    low = cast(first * cos - second * sin, dtype)
    high = cast(second * cos + first * sin, dtype)

    q_to = q_out_ptr + (token * num_q_heads + heads) * HEAD_DIM + column
    k_to = k_out_ptr + (slot * num_kv_heads + k_heads) * HEAD_DIM + column
    tl.store(q_to, low, mask=is_q)
    tl.store(q_to + HALF, high, mask=is_q)
    tl.store(k_to, low, mask=is_k)
    tl.store(k_to + HALF, high, mask=is_k)
    if v_out_ptr is not None:
        v_to = v_out_ptr + (slot * num_kv_heads + v_heads) * HEAD_DIM + column
        tl.store(v_to, v_first, mask=is_v)
        tl.store(v_to + HALF, v_second, mask=is_v)


def _launch_rope(
    q_out: Tensor,
    k_out: Tensor,
    v_out: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    positions: Tensor,
    cos_sin: Tensor,
    slots: Tensor | None,
    inverse: bool = False,
) -> None:
    """q [T, Hq, D], k and v [T, Hkv, D] with dense heads; q_out dense, k_out and v_out dense rows of heads."""
    (num_tokens, num_q_heads, head_dim), num_kv_heads = q.shape, k.shape[1]
    heads = num_q_heads + (1 if v is None else 2) * num_kv_heads
    config = _config(tuning.device_of(q), num_tokens, heads, head_dim)
    _rope_kernel[(num_tokens, triton.cdiv(heads, config["HEADS"]))](
        q_out,
        k_out,
        v_out,
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
        HEAD_DIM=head_dim,
        INVERSE=inverse,
        **config,
        **pdl_options(q),
    )


def _check_table(name: str, x: Tensor, head_dim: int, positions: Tensor, cos_sin: Tensor) -> None:
    """x [T, ...] is what will be rotated. A float64 table is for float64 alone."""
    dtypes = (torch.float32, torch.float64) if x.dtype == torch.float64 else (torch.float32,)
    check_tensor(name, "positions", positions, (len(x),), dtypes=INTEGERS)
    check_tensor(name, "cos_sin", cos_sin, ("context", head_dim), dtypes=dtypes, dense=True)
    check_range(name, "positions", positions, 0, len(cos_sin))


def unsupported_heads(head_dim: int) -> str | None:
    return None if head_dim in HEAD_DIMS else f"heads of {head_dim} (16, 32, 64 or 128)"


def check_places(
    name: str,
    x: Tensor,
    source: str,
    width: int,
    positions: Tensor,
    cos_sin: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
) -> None:
    """Raises unless q, k and v of x's tokens, ``width`` elements a token from ``source``, can go where these say."""
    check_cache(name, k_pages, v_pages, like=x)
    head_dim = k_pages.shape[-1]
    _check_table(name, x, head_dim, positions, cos_sin)
    check_tensor(name, "slots", slots, (len(x),), dtypes=INTEGERS)
    check_device(
        name, **{source: x}, positions=positions, cos_sin=cos_sin, k_pages=k_pages, v_pages=v_pages, slots=slots
    )
    num_pages, page_size, num_kv_heads, _ = k_pages.shape
    check_range(name, "slots", slots, 0, num_pages * page_size)
    if width % head_dim or width // head_dim <= 2 * num_kv_heads:
        raise ValueError(
            f"{name}: {source}'s rows of {width} must hold more than {2 * num_kv_heads} heads of {head_dim}, "
            f"the cache's k and v, and no part of one"
        )


def _fake_apply_rope(
    q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _save_angles(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, cos_sin, positions, ctx.inverse = inputs
    if ctx.needs_input_grad[2]:
        raise NotImplementedError("apply_rope has no gradient of cos_sin; expected a table that requires none")
    ctx.save_for_backward(cos_sin, positions)


def _rotate_back(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.qwenkern.apply_rope(
        grad_q.contiguous(), grad_k.contiguous(), *ctx.saved_tensors, inverse=not ctx.inverse
    )
    return *grads, None, None, None


def _fake_rope_and_cache(
    qkv: Tensor, positions: Tensor, cos_sin: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor
) -> Tensor:
    _, _, num_kv_heads, head_dim = k_pages.shape
    return qkv.new_empty(qkv.shape[0], qkv.shape[1] // head_dim - 2 * num_kv_heads, head_dim)


@op(fake=_fake_apply_rope, gradient=(_save_angles, _rotate_back))
def apply_rope(
    q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864, equation 34), half-split as in GPT-NeoX and Qwen2.

    q [T, Hq, D] and k [T, Hkv, D] of one dtype, tokens of any stride with dense heads; cos_sin [context, D] float32;
    positions [T] integers within the context. Returns q and k, rotated in float32 and rounded once; ``inverse`` rotates
    them back, by the negative angle."""
    check_tensor("apply_rope", "q", q, ("T", "Hq", "D"))
    check_tensor("apply_rope", "k", k, (len(q), "Hkv", q.shape[2]), like=q)
    if q.shape[2] % 2:
        raise ValueError(f"apply_rope: heads must have an even size, and q's have {q.shape[2]}")
    _check_table("apply_rope", q, q.shape[2], positions, cos_sin)
    check_device("apply_rope", q=q, k=k, cos_sin=cos_sin, positions=positions)
    if not runs_on_triton(q, unsupported_heads(q.shape[2])):
        in_c = c_backend.takes(c_backend.refuses_apply_rope, q, k, cos_sin, positions, inverse)
        return (c_backend if in_c else reference).apply_rope(q, k, cos_sin, positions, inverse)
    q, k = (x if x.stride(1) == x.shape[2] else x.contiguous() for x in (q, k))
    q_out, k_out = _fake_apply_rope(q, k, cos_sin, positions)
    _launch_rope(q_out, k_out, None, q, k, None, positions, cos_sin, None, inverse)
    return q_out, k_out


@op(fake=_fake_rope_and_cache, mutates=("k_pages", "v_pages"))
def rope_and_cache(
    qkv: Tensor, positions: Tensor, cos_sin: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor
) -> Tensor:
    """Splits qkv [T, (Hq + 2 Hkv) D], rotates q and k, writes k and v into their slots, returns q [T, Hq, D].

    Changes k_pages and v_pages [num_pages, page_size, Hkv, D], of qkv's dtype. positions [T] and slots [T] are
    integers; a slot is ``page * page_size + offset``, and no two tokens share one. On a GPU they are not checked."""
    check_tensor("rope_and_cache", "qkv", qkv, ("T", "(Hq + 2 Hkv) D"))
    check_places("rope_and_cache", qkv, "qkv", qkv.shape[1], positions, cos_sin, k_pages, v_pages, slots)
    _, _, num_kv_heads, head_dim = k_pages.shape
    if not runs_on_triton(qkv, unsupported_heads(head_dim)):
        if c_backend.takes(c_backend.refuses_rope_and_cache, qkv, positions, cos_sin, k_pages, v_pages, slots):
            return c_backend.rope_and_cache(qkv, positions, cos_sin, k_pages, v_pages, slots)
        return reference.rope_and_cache(qkv, positions, cos_sin, k_pages, v_pages, slots)
    heads = qkv.unflatten(1, (-1, head_dim))
    q, k, v = heads.split((heads.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads), dim=1)
    q_out = q.new_empty(q.shape)
    _launch_rope(q_out, k_pages, v_pages, q, k, v, positions, cos_sin, slots)
    return q_out
