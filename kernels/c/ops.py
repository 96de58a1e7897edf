"""Which tensors the C functions take, and how they are called with them. The public ops say what each computes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..environment import KERNELS
from . import threads
from .build import library, multiplies
from .choose import rows_size
from .tape import run, scratch

MAX_TOKENS = 16  # of a linear that reads its weights row by row
MAX_GROUP = 16  # query heads of a key-value head
SPLIT = 128  # cached tokens that a thread attends to at a time
BLOCK = 64  # cached tokens that are packed at a time
LANES = 16  # values of a row that are computed at once, at most
LINE = 32  # values of a row that are multiplied at a time; all as in C
HEAD_DIMS = (32, 64, 96, 128)
SMALL = 1 << 15  # elements that one thread is through with before it has woken another


def takes_linear(x: Tensor) -> bool:
    """Whether x [T, K] is of a kind that linear takes."""
    return x.shape[1] % LINE == 0 and _usable(x) and (len(x) <= MAX_TOKENS or multiplies())


def linear(
    x: Tensor,
    weight: Tensor,
    *,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    up: Tensor | None = None,
    bias: Tensor | None = None,
    addend: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor]:
    """x [T, K] times weight [N, K] transposed, plus bias [N], plus addend [T, N]: (out [T, N], new residual [T, K]).

    With ``norm_weight`` [K] x is first added to ``residual`` and normalised; with ``up`` [N, K] out is
    silu(x weight^T) * (x up^T). Without a residual, the new one is x itself."""
    (num_tokens, k), n = x.shape, len(weight)
    out = x.new_empty(num_tokens, n, dtype=out_dtype)
    new_residual = None if residual is None else x.new_empty(num_tokens, k)
    few = num_tokens <= MAX_TOKENS
    rows = scratch(rows_size(library(), num_tokens, k, 0 if few else threads.count()))
    strides = (0 if t is None else t.stride(0) for t in (x, residual, weight, addend))
    run(
        "few_tokens" if few else "many_tokens",
        (out, new_residual, rows, x, residual, norm_weight, weight, up, bias, addend),
        (num_tokens, n, k, *strides, out_dtype == torch.float32),
        eps,
    )
    return out, x if new_residual is None else new_residual


def takes_rows(weight: Tensor) -> bool:
    """Whether embedding takes this table."""
    return weight.stride(1) == 1 and _usable(weight)


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    out = weight.new_empty(len(ids), weight.shape[1])
    run("embedding", (out, weight, ids.long().contiguous()), (*out.shape, weight.stride(0)))
    return out


def takes_heads(q: Tensor, k_pages: Tensor) -> bool:
    """Whether q [.., Hq, D] over pages [.., Hkv, D] suits C; q may still be packed with k and v."""
    num_kv_heads, head_dim = k_pages.shape[-2:]
    group = q.shape[1] // num_kv_heads if q.dim() == 3 else 1
    return head_dim in HEAD_DIMS and group <= MAX_GROUP and _usable(q)


def takes_prefill(q: Tensor, k_pages: Tensor) -> bool:
    return takes_heads(q, k_pages) and multiplies()


def rope_and_cache(
    qkv: Tensor, positions: Tensor, cos_sin: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor
) -> Tensor:
    num_kv_heads, head_dim = k_pages.shape[-2:]
    q = qkv.new_empty(len(qkv), qkv.shape[1] // head_dim - 2 * num_kv_heads, head_dim)
    run(
        "rope_and_cache",
        (q, k_pages, v_pages, qkv, positions.long().contiguous(), slots.long().contiguous(), cos_sin),
        (len(qkv), q.shape[1], num_kv_heads, head_dim, qkv.stride(0)),
    )
    return q


def takes_rope(q: Tensor) -> bool:
    """Whether apply_rope takes q [T, Hq, D] and a k of its kind."""
    return q.shape[2] in HEAD_DIMS and _usable(q)


def apply_rope(
    q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """q and k rotated by the angles of the table; ``inverse``: backwards, which is also how gradients go."""
    (num_tokens, num_q_heads, head_dim), num_kv_heads = q.shape, k.shape[1]
    q, k = _dense_heads(q), _dense_heads(k)
    outs = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k)]
    run(
        "apply_rope",
        (*outs, q, k, positions.long().contiguous(), cos_sin),
        (num_tokens, num_q_heads, num_kv_heads, head_dim, q.stride(0), k.stride(0)),
        -1.0 if inverse else 1.0,
        _team(q.numel() + k.numel()),
    )
    return outs[0], outs[1]


def takes_norm(x: Tensor) -> bool:
    """Whether rms_norm and add_rms_norm take x [..., H]."""
    return x.shape[-1] % LANES == 0 and _usable(x)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _normed(x, None, weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _normed(x, residual, weight, eps)


def _normed(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor | None]:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    new_residual = None if residual is None else torch.empty_like(out)
    x, residual = _rows(x), None if residual is None else _rows(residual)
    run(
        "add_rms_norm",
        (out, new_residual, x, residual, weight),
        (*x.shape, x.stride(0), 0 if residual is None else residual.stride(0)),
        eps,
        _team(x.numel()),
    )
    return out, new_residual


def takes_gate(gate: Tensor) -> bool:
    """Whether silu_mul takes gate [..., F], or swiglu gate_up."""
    return _usable(gate)


def swiglu(gate_up: Tensor) -> Tensor:
    return silu_mul(*gate_up.chunk(2, dim=-1))


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    gate, up = _rows(gate), _rows(up)
    run("silu_mul", (out, gate, up), (*gate.shape, gate.stride(0), up.stride(0)), team=_team(gate.numel()))
    return out


def decode_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, block_tables: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    q = _dense_heads(q)
    (num_sequences, num_q_heads, head_dim), (_, page_size, num_kv_heads, _) = q.shape, k_pages.shape
    splits = -(-block_tables.shape[1] * page_size // SPLIT)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    parts = scratch(num_sequences * num_q_heads * splits * (head_dim + 2))
    tables, lengths = (t.int().contiguous() for t in (block_tables, lengths))
    run(
        "decode_attention",
        (out, parts, q, k_pages, v_pages, tables, lengths),
        (
            *(num_sequences, splits, page_size, num_kv_heads, num_q_heads // num_kv_heads, head_dim),
            *(q.stride(0), tables.stride(0)),
        ),
        scale,
    )
    return out


def prefill_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_tables: Tensor,
    lengths: Tensor,
    query_starts: Tensor,
    scale: float,
) -> Tensor:
    q = _dense_heads(q)
    (_, num_q_heads, head_dim), (_, page_size, num_kv_heads, _) = q.shape, k_pages.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    blocks = sum(-(-length // BLOCK) for length in lengths.tolist())
    tables, lengths, starts = (t.int().contiguous() for t in (block_tables, lengths, query_starts))
    run(
        "prefill_attention",
        (out, scratch(2 * blocks * num_kv_heads * head_dim * BLOCK), q, k_pages, v_pages, tables, lengths, starts),
        (
            *(len(lengths), page_size, num_kv_heads, num_q_heads // num_kv_heads, head_dim),
            *(q.stride(0), tables.stride(0)),
        ),
        scale,
    )
    return out


def _rows(x: Tensor) -> Tensor:
    """x [..., H] as [T, H]; a copy only where its rows are not one stride apart."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _dense_heads(x: Tensor) -> Tensor:
    """x [T, heads, D]; a copy only where a token's heads do not lie one after the other."""
    return x if x.stride(1) == x.shape[2] else x.contiguous()


def _team(elements: int) -> int | None:
    """How many share the work of an op over so many elements; None: all."""
    return 1 if elements <= SMALL else None


def _usable(x: Tensor) -> bool:
    return x.is_cpu and x.dtype == torch.bfloat16 and KERNELS.get() != "reference" and library() is not None
