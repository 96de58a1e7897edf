"""The torch twin of every op: the specification, and what runs on a CPU.

Same names and signatures as the kernels. Rounding follows transformers' Qwen2 (modeling_qwen2.py), except where a value
can stay in float32 longer for nothing. float64 inputs are computed in float64 throughout: that is the oracle of tests.

Shapes: T tokens, S sequences, Hq query heads, Hkv key-value heads, D head size, F intermediate size.
Pages: ``k_pages`` and ``v_pages`` are [num_pages, page_size, Hkv, D]; token t of a sequence lies in page
``block_table[t // page_size]`` at offset ``t % page_size``, and its *slot* is ``page * page_size + offset``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """Rows [T, K] of weight [V, K] with the numbers ids [T]."""
    return weight[ids]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019, arXiv:1910.07467).

    The quotient is computed in float32 and rounded to x's dtype before the product with the weight."""
    wide = _wide(x)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Adds x to the residual stream and normalises the sum: (normed, new residual), both like x.

    The sum is rounded to the dtype before its variance is taken. ``residual=None`` starts a stream with x itself."""
    if residual is not None:
        x = residual + x
    return rms_norm(x, weight, eps), x


def rms_norm_backward(
    grad: Tensor, grad_residual: Tensor | None, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The gradients of rms_norm, or with grad_residual those of add_rms_norm: (of x, [..., H]; of the weight, [H]).

    grad is what came back for the normed rows, grad_residual for the new residual; x is the row that was normalised,
    for add_rms_norm the new residual, and its gradient that of both summands. The first is computed in float32 and
    rounded once; the second sums, in float32, the products of grad with the quotient, rounded as in the op."""
    wide, wide_grad = _wide(x), _wide(grad)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normed, scaled = wide * scale, wide_grad * weight
    grad_x = scale * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    if grad_residual is not None:
        grad_x = grad_x + grad_residual
    grad_weight = (wide_grad * normed.to(x.dtype)).reshape(-1, x.shape[-1]).sum(0)
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype)


def apply_rope(
    q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864, equation 34), half-split as in GPT-NeoX and Qwen2.

    q [T, Hq, D] and k [T, Hkv, D]; cos_sin [positions, D] float32, cosines in the first half of a row and sines in the
    second; positions [T]. Computed in float32, rounded once. ``inverse`` rotates back, which is also the gradient."""
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)  # [T, 1, D/2] each
    sin = -sin if inverse else sin

    def rotate(x: Tensor) -> Tensor:
        first, second = _wide(x).chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)

    return rotate(q), rotate(k)


def rope_and_cache(
    qkv: Tensor, positions: Tensor, cos_sin: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor
) -> Tensor:
    """Splits qkv [T, (Hq + 2 Hkv) D], rotates q and k, writes k and v into their slots, returns q [T, Hq, D].

    Changes k_pages and v_pages. positions [T] and slots [T] are integers."""
    num_kv_heads, head_dim = k_pages.shape[-2:]
    heads = qkv.unflatten(-1, (-1, head_dim))
    q, k, v = heads.split((heads.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads), dim=1)
    q, k = apply_rope(q, k, cos_sin, positions)
    k_pages.view(-1, num_kv_heads, head_dim)[slots] = k
    v_pages.view(-1, num_kv_heads, head_dim)[slots] = v
    return q


def decode_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, block_tables: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    """Attention of one query token a sequence over its cached tokens, itself included.

    q [S, Hq, D]; block_tables [S, pages] and lengths [S] integers, lengths at least 1. Returns [S, Hq, D]."""
    num_kv_heads = k_pages.shape[-2]
    out = torch.empty_like(q)
    for row, length in enumerate(lengths.tolist()):
        k, v = _gather(k_pages, v_pages, block_tables[row], length)
        # the query heads that share a key-value head are its rows, so nothing of the cache is repeated
        grouped = q[row].unflatten(0, (num_kv_heads, -1))
        out[row] = F.scaled_dot_product_attention(grouped[None], k[None], v[None], scale=scale)[0].flatten(0, 1)
    return out


def waits_for_host(num_q_heads: int, k_pages: Tensor) -> bool:
    """Whether decode_attention over these pages looks at lengths on the host, so that no graph can capture it."""
    return True


def prefill_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_tables: Tensor,
    lengths: Tensor,
    query_starts: Tensor,
    scale: float,
) -> Tensor:
    """Causal attention of several query tokens a sequence, packed without padding, over the cached tokens.

    q [T, Hq, D]; the rows query_starts[s] to query_starts[s + 1] belong to sequence s and are its last ones: the query
    in row query_starts[s + 1] - 1 sees all lengths[s] tokens. Returns [T, Hq, D]."""
    out = torch.empty_like(q)
    starts = query_starts.tolist()
    for row, length in enumerate(lengths.tolist()):
        queries = q[starts[row] : starts[row + 1]].transpose(0, 1)
        k, v = _gather(k_pages, v_pages, block_tables[row], length)
        out[starts[row] : starts[row + 1]] = attention(queries[None], k[None], v[None], scale)[0]
    return out


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention of the last Tq tokens of B sequences: q [B, Hq, Tq, D], k and v [B, Hkv, Tk, D]; the last query
    sees all keys. Returns [B, Tq, Hq, D]."""
    queries, keys = q.shape[2], k.shape[2]
    mask = None
    if 1 < queries < keys:  # a cached prefix: the triangle sits at the lower right
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    causal = queries == keys and queries > 1
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=True).transpose(1, 2)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020, arXiv:2002.05202) of gate_up [..., 2 F], gate in the first half: [..., F].

    silu is rounded to the dtype before the product."""
    return silu_mul(*gate_up.chunk(2, dim=-1))


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up of two tensors [..., F]: swiglu of projections that are not packed."""
    return F.silu(gate) * up


def swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient of swiglu's gate_up [..., 2 F], packed like it, from that of its result, grad [..., F]."""
    return torch.cat(silu_mul_backward(grad, *gate_up.chunk(2, dim=-1)), dim=-1)


def silu_mul_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of silu_mul's gate and up, from that of its result, all [..., F].

    That of gate is computed in float32 and rounded once; that of up is grad times silu, rounded as in the op."""
    wide = _wide(gate)
    sigmoid = torch.sigmoid(wide)
    slope = sigmoid * (1 + wide * (1 - sigmoid))
    return (_wide(grad) * _wide(up) * slope).to(gate.dtype), grad * F.silu(gate)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """x [T, K] times weight [N, K] transposed, plus bias [N], plus residual [T, N]: [T, N]."""
    out = F.linear(x, weight, bias)
    return out if residual is None else residual + out


def invariant_tokens(weight: Tensor) -> int:
    """How many tokens the linears of weights like this one take whose bits do not depend on each other's number."""
    return 1


def norm_linear(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """add_rms_norm, then linear: (out [T, N], new residual [T, K])."""
    normed, residual = add_rms_norm(x, residual, norm_weight, eps)
    return linear(normed, weight, bias), residual


def norm_qkv_rope(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    cos_sin: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
) -> tuple[Tensor, Tensor]:
    """norm_linear with the packed weight [(Hq + 2 Hkv) D, K], then rope_and_cache: (q [T, Hq, D], new residual)."""
    qkv, residual = norm_linear(x, residual, norm_weight, eps, weight, bias)
    return rope_and_cache(qkv, positions, cos_sin, k_pages, v_pages, slots), residual


def norm_swiglu_linear(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor, eps: float, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """add_rms_norm, then linear with the packed weight [2 F, K], then swiglu: (out [T, F], new residual [T, K])."""
    gate_up, residual = norm_linear(x, residual, norm_weight, eps, weight)
    return swiglu(gate_up), residual


def lm_head(x: Tensor, residual: Tensor | None, norm_weight: Tensor, eps: float, weight: Tensor) -> Tensor:
    """The last norm and the product with the vocabulary: logits [T, V] in float32."""
    return _wide(norm_linear(x, residual, norm_weight, eps, weight)[0])


def lm_head_top_k(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor, eps: float, weight: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """The k largest logits of each token, [T, k] in float32, largest first, and their ids, [T, k] int64. Of equal ones
    the lower id comes first, so that k = 1 is the arg-max of greedy decoding."""
    logits = lm_head(x, residual, norm_weight, eps, weight)
    values, ids = logits.sort(dim=-1, descending=True, stable=True)
    return values[:, :k], ids[:, :k]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _gather(k_pages: Tensor, v_pages: Tensor, block_table: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The first ``length`` tokens of one sequence: k and v, [Hkv, length, D] each."""
    pages = block_table[: -(-length // k_pages.shape[1])].long()
    k, v = (paged[pages].flatten(0, 1)[:length].transpose(0, 1) for paged in (k_pages, v_pages))
    return k, v
