"""The ops of a layer before its attention, in one launch: norm, q k v, rotary embedding, write into the cache.

    qkv = round(rms_norm(x) W' + bias);  then as rope_and_cache (rope.py)

x is [T, K]. W is [N, K] with N = (Hq + 2 Hkv) D, its heads in the order q, k, v. Values are rounded where norm_linear
and rope_and_cache round them. Bytes moved: the weight, T K elements of x, T N of q, k and v. Up to 16 tokens run in one
kernel, which reads the weight as few_tokens.py describes. More tokens run norm_linear and then rope_and_cache.

A rotation needs elements i and i + D/2 of a head, so a tile takes BLOCK_N / 2 rows of each half:

    weight of a head [D, K]     ░░ program 0   ▒▒ program 1 ...   │   ░░ program 0   ▒▒ program 1 ...
                                0                                D/2                               D
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..language import cast, round_to
from ..linear import norm_linear
from ..pages import Pages
from ..rope import rope_and_cache
from ..weights import Stack, Weight
from .backend import TRITON
from .few_tokens import MAX_TOKENS, multiply
from .launching import planned
from .linear import refuses_norm
from .rope import refuses_pages
from .tiling import tiling


class RopeArguments(NamedTuple):
    q_out: Any  # [T, Hq, D]
    pages: Any  # the named tuple of their format; the kernel writes k and v there
    bias: Any  # [N], or None
    positions: Any  # [T]
    cos_sin: Any  # [context, D] float32
    slots: Any  # [T]
    num_q_heads: Any
    num_kv_heads: Any


@triton.jit
def _place(tile, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr):
    """The head of a tile, and the tile's first element in each half of that head."""
    tiles: tl.constexpr = HEAD_DIM // BLOCK_N
    tile = tl.cast(tile, tl.int32)  # under the interpreter, a loop variable is a Python number
    return tile // tiles, tile % tiles * (BLOCK_N // 2)


# The functions that few_tokens.multiply calls get a tuple: RopeArguments, HEAD_DIM, STORE_K, STORE_V.


@triton.jit
def _rows(args, tile, places, BLOCK_N: tl.constexpr):
    head_dim: tl.constexpr = args[1]
    half: tl.constexpr = BLOCK_N // 2
    head, first = _place(tile, BLOCK_N, head_dim)
    return tl.cast(head, tl.int64) * head_dim + first + places % half + places // half * (head_dim // 2)


@triton.jit
def _bias_angles_and_slots(args, tile, tokens, num_tokens, BLOCK_N: tl.constexpr):
    rope = args[0]
    head_dim: tl.constexpr = args[1]
    token = tl.minimum(tokens, num_tokens - 1)
    position = tl.load(rope.positions + token)
    slot = tl.load(rope.slots + token).to(tl.int64)
    bias = tl.zeros([BLOCK_N], tl.float32)
    if rope.bias is not None:
        bias = tl.load(rope.bias + _rows(args, tile, tl.arange(0, BLOCK_N), BLOCK_N)).to(tl.float32)
    _, first = _place(tile, BLOCK_N, head_dim)
    column = first + tl.arange(0, BLOCK_N // 2)[:, None]
    angle = rope.cos_sin + position.to(tl.int64)[None, :] * head_dim + column
    return bias, tl.load(angle), tl.load(angle + head_dim // 2), slot


@triton.jit
def _rotate_and_store(args, tile, products, inputs, tokens, num_tokens):
    rope = args[0]
    head_dim: tl.constexpr = args[1]
    STORE_K: tl.constexpr = args[2]
    STORE_V: tl.constexpr = args[3]
    BLOCK_N: tl.constexpr = products.shape[0]
    BLOCK_T: tl.constexpr = products.shape[1]
    half: tl.constexpr = BLOCK_N // 2
    dtype = rope.q_out.dtype.element_ty
    bias, cos, sin, slot = inputs
    if rope.bias is not None:
        products += bias[:, None]
    low, high = tl.split(tl.permute(tl.reshape(round_to(products, dtype), [2, half, BLOCK_T]), [1, 2, 0]))
    head, first = _place(tile, BLOCK_N, head_dim)
    column = first + tl.arange(0, half)[:, None]
    is_v = head >= rope.num_q_heads + rope.num_kv_heads
    first_half = cast(tl.where(is_v, low, low * cos - high * sin), dtype)
    second_half = cast(tl.where(is_v, high, high * cos + low * sin), dtype)

    mask = tl.broadcast_to(tokens[None, :] < num_tokens, [half, BLOCK_T])
    slot = slot[None, :]
    k_head = head - rope.num_q_heads
    if k_head < 0:
        to = rope.q_out + (tokens[None, :].to(tl.int64) * rope.num_q_heads + head) * head_dim + column
        tl.store(to, first_half, mask=mask)
        tl.store(to + head_dim // 2, second_half, mask=mask)
    elif k_head < rope.num_kv_heads:
        heads = rope.num_kv_heads
        STORE_K(rope.pages, slot, k_head, heads, column, first_half, second_half, mask, head_dim)
    else:
        heads = rope.num_kv_heads
        v_head = k_head - heads
        STORE_V(rope.pages, slot, v_head, heads, column, first_half, second_half, mask, head_dim)


@planned
@triton.jit
def _norm_qkv_rope_kernel(
    args,  # RopeArguments
    x_ptr,  # [T, K]
    norm_weight_ptr,  # [K]
    weight,  # [N, K], the named tuple of its format
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
    STORE_K: tl.constexpr,  # of the pages' format
    STORE_V: tl.constexpr,
    HEAD_DIM: tl.constexpr,
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
    multiply(
        (args, HEAD_DIM, STORE_K, STORE_V), x_ptr, norm_weight_ptr, weight, None, None, num_tokens, num_tiles, k_size,
        x_stride, eps, LOAD, LOAD_GROUPS, OPERAND, MULTIPLY, PREFETCH, FORM, _rows, _bias_angles_and_slots,
        _rotate_and_store, BLOCK_T, BLOCK_ROW, BLOCK_N, BLOCK_K, AHEAD, SPLIT_K, SLICES, EVEN_K, RESIDENT, LOOPS,
        PREFETCH_LINES, STAGES, PDL,
    )  # fmt: skip


def _launch_norm_qkv_rope(
    q_out: Tensor,
    pages: Pages,
    x: Tensor,
    norm_weight: Tensor,
    weight: Weight,
    bias: Tensor | None,
    positions: Tensor,
    cos_sin: Tensor,
    slots: Tensor,
    eps: float,
) -> None:
    (num_tokens, k_size), (_, num_q_heads, head_dim) = x.shape, q_out.shape
    tiles, programs, constants = tiling("norm_qkv_rope", x, weight, most_rows=head_dim)
    _norm_qkv_rope_kernel[(programs,)](
        RopeArguments(
            q_out, pages.triton_arguments(), bias, positions, cos_sin, slots, num_q_heads, pages.num_kv_heads
        ),
        x,
        norm_weight,
        weight.triton_arguments(),
        num_tokens,
        tiles,
        k_size,
        x.stride(0),
        eps,
        STORE_K=pages.triton_store_k,
        STORE_V=pages.triton_store_v,
        HEAD_DIM=head_dim,
        **constants,
    )


@TRITON.implements()
def norm_qkv_rope(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Weight,
    bias: Tensor | None,
    positions: Tensor,
    cos_sin: Tensor,
    pages: Pages,
    slots: Tensor,
) -> Tensor:
    """Runs one kernel if it takes the arguments, else norm_linear and rope_and_cache. A tile of the kernel is a part
    of a head, so the kernel does not take pages whose scales depend on a whole head."""
    fits = not isinstance(weight, Stack) and pages.head_dim // 2 % weight.row_tile == 0 and not pages.triton_whole_heads
    if len(x) > MAX_TOKENS or not fits or refuses_norm(x, weight) or refuses_pages(pages):
        qkv = norm_linear(x, norm_weight, eps, weight, bias)
        return rope_and_cache(qkv, positions, cos_sin, pages, slots)
    q_out = x.new_empty(len(x), len(weight) // pages.head_dim - 2 * pages.num_kv_heads, pages.head_dim)
    _launch_norm_qkv_rope(q_out, pages, x, norm_weight, weight, bias, positions, cos_sin, slots, eps)
    return q_out
