"""Rotary position embedding of q and k, and the write of k and v into the paged cache.

    rotated[i]         = round(x[i] * cos[i] - x[i + D/2] * sin[i])         i < D/2, half-split as in Qwen2
    rotated[i + D/2]   = round(x[i + D/2] * cos[i] + x[i] * sin[i])

cos_sin [context, D] is float32, with cosines in the first half of a row and sines in the second. Products and sums are
float32 and are rounded once. v is copied. Rotation by the negative angle is the inverse, and computes the gradient.
Bytes moved: 2 T (Hq + 2 Hkv) D elements, and 4 T D bytes of the table.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import INTEGERS, check_device, check_range, check_tensor, wide
from .contract import Steps, op
from .pages import Pages, check_pages


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


@op(gradient=(_save_angles, _rotate_back))
def apply_rope(
    q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor, inverse: bool = False
) -> Steps[tuple[Tensor, Tensor]]:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864, equation 34), half-split as in GPT-NeoX and Qwen2.

    q [T, Hq, D] and k [T, Hkv, D] have one dtype. Tokens may have any stride; the heads of a token are dense. cos_sin
    [context, D] is float32. positions [T] are integers from 0 to context - 1. Returns q and k, rotated in float32 and
    rounded once. ``inverse`` rotates by the negative angle."""
    check_tensor("apply_rope", "q", q, ("T", "Hq", "D"))
    check_tensor("apply_rope", "k", k, (q.shape[0], "Hkv", q.shape[2]), like=q)
    if q.shape[2] % 2:
        raise ValueError(f"apply_rope: heads must have an even size, and q's have {q.shape[2]}")
    _check_table("apply_rope", q, q.shape[2], positions, cos_sin)
    check_device("apply_rope", q=q, k=k, cos_sin=cos_sin, positions=positions)
    yield
    return rotated(q, k, cos_sin, positions, inverse)


@op(mutates=("pages",))
def rope_and_cache(qkv: Tensor, positions: Tensor, cos_sin: Tensor, pages: Pages, slots: Tensor) -> Steps[Tensor]:
    """Splits qkv [T, (Hq + 2 Hkv) D], rotates q and k, writes k and v into their slots, and returns q [T, Hq, D].

    The rows of qkv may have any stride; their heads are in the order q, k, v. The op writes to the pages, or to the
    pair (k_pages, v_pages) of [num_pages, page_size, Hkv, D] in qkv's dtype. positions [T] and slots [T] are integers.
    A slot is ``page * page_size + offset``, and no two tokens may have the same slot. On a GPU the values of positions
    and slots are not checked."""
    check_tensor("rope_and_cache", "qkv", qkv, ("T", "(Hq + 2 Hkv) D"))
    check_places("rope_and_cache", qkv, "qkv", qkv.shape[1], positions, cos_sin, pages, slots)
    yield
    return rotated_into_cache(qkv, positions, cos_sin, pages, slots)


def rotated(q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """The reference of apply_rope, without its checks."""
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)  # [T, 1, D/2] each
    sin = -sin if inverse else sin

    def rotate(x: Tensor) -> Tensor:
        first, second = wide(x).chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)

    return rotate(q), rotate(k)


def split_heads(qkv: Tensor, pages: Pages) -> tuple[Tensor, Tensor, Tensor]:
    """Views of qkv [T, (Hq + 2 Hkv) D]: q [T, Hq, D], k and v [T, Hkv, D]."""
    heads, num_kv_heads = qkv.unflatten(1, (-1, pages.head_dim)), pages.num_kv_heads
    q, k, v = heads.split((heads.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads), dim=1)
    return q, k, v


def rotated_into_cache(qkv: Tensor, positions: Tensor, cos_sin: Tensor, pages: Pages, slots: Tensor) -> Tensor:
    """The reference of rope_and_cache, without its checks."""
    q, k, v = split_heads(qkv, pages)
    q, k = rotated(q, k, cos_sin, positions)
    pages.store(slots, k, v)
    return q


def _check_table(name: str, x: Tensor, head_dim: int, positions: Tensor, cos_sin: Tensor) -> None:
    """Checks the rotary table and the positions for x [T, ...], which will be rotated. Only a float64 x may have a
    float64 table."""
    dtypes = (torch.float32, torch.float64) if x.dtype == torch.float64 else (torch.float32,)
    check_tensor(name, "positions", positions, (x.shape[0],), dtypes=INTEGERS)
    check_tensor(name, "cos_sin", cos_sin, ("context", head_dim), dtypes=dtypes, dense=True)
    check_range(name, "positions", positions, 0, cos_sin.shape[0])


def check_places(
    name: str,
    x: Tensor,
    source: str,
    width: int,
    positions: Tensor,
    cos_sin: Tensor,
    pages: Pages,
    slots: Tensor,
) -> None:
    """Raises ValueError or TypeError unless q, k and v can be rotated and stored at these positions and slots.

    ``source`` names the argument that q, k and v come from, and ``width`` is the number of their elements a token."""
    check_pages(name, pages, like=x)
    num_pages, page_size, num_kv_heads, head_dim = pages.shape
    _check_table(name, x, head_dim, positions, cos_sin)
    check_tensor(name, "slots", slots, (x.shape[0],), dtypes=INTEGERS)
    check_device(name, **{source: x}, positions=positions, cos_sin=cos_sin, pages=pages, slots=slots)
    check_range(name, "slots", slots, 0, num_pages * page_size)
    if width % head_dim or width // head_dim <= 2 * num_kv_heads:
        raise ValueError(
            f"{name}: {source}'s rows of {width} must hold more than {2 * num_kv_heads} heads of {head_dim}, "
            f"the cache's k and v, and no part of one"
        )
