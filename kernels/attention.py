"""Causal grouped-query attention. Two ops read keys and values from the paged cache: one for a single query token a
sequence, one for several. A third op reads contiguous keys and values, as other projects store them.

    out[i, h] = softmax(scale * q[i, h] . k[: p + 1, h // group]) v[: p + 1, h // group]     row i has position p

Scores and sums are float32. The softmax weights are rounded to v's dtype before they multiply v. Bytes moved:
2 Hkv D elements for each cached token, and q and out once. Operations: 4 Hq D for each pair of query and key.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import INTEGERS, can_look_at, check_device, check_range, check_tensor
from .contract import Steps, op
from .dispatch import serving
from .pages import Pages, check_pages


def _fake_decode_attention(q: Tensor, pages: Pages, block_tables: Tensor, lengths: Tensor, scale: float) -> Tensor:
    return q.new_empty(q.shape)


@op(fake=_fake_decode_attention)
def decode_attention(q: Tensor, pages: Pages, block_tables: Tensor, lengths: Tensor, scale: float) -> Steps[Tensor]:
    """Attention of one query token a sequence over the sequence's cached tokens, its own included (Vaswani et al. 2017,
    arXiv:1706.03762, equation 1; grouped: Ainslie et al. 2023, arXiv:2305.13245).

    q [S, Hq, D] may have any stride between sequences. The pages are dense and of q's dtype, or the pair
    (k_pages, v_pages), each [num_pages, page_size, Hkv, D]. block_tables [S, P] and lengths [S] are integers; a length
    is from 1 to P * page_size. Returns [S, Hq, D]. Page numbers beyond a sequence's length are never read. Several
    tokens of one sequence may be rows with the same pages, each with its own length. On a GPU the values of lengths and
    block_tables are not checked."""
    _check_paged("decode_attention", q, pages, block_tables, lengths)
    if q.shape[0] != lengths.shape[0]:
        raise ValueError(f"decode_attention: q has {q.shape[0]} rows, and lengths says {lengths.shape[0]} sequences")
    yield
    out = torch.empty_like(q)
    for row, length in enumerate(lengths.tolist()):
        k, v = pages.gather(block_tables[row], length)
        # The query heads that share a key-value head become rows of one product, so keys and values are not repeated.
        grouped = q[row].unflatten(0, (k.shape[0], -1))
        out[row] = F.scaled_dot_product_attention(grouped[None], k[None], v[None], scale=scale)[0].flatten(0, 1)
    return out


def _fake_prefill_attention(
    q: Tensor, pages: Pages, block_tables: Tensor, lengths: Tensor, query_starts: Tensor, scale: float
) -> Tensor:
    return q.new_empty(q.shape)


@op(fake=_fake_prefill_attention)
def prefill_attention(
    q: Tensor, pages: Pages, block_tables: Tensor, lengths: Tensor, query_starts: Tensor, scale: float
) -> Steps[Tensor]:
    """Causal attention of several query tokens a sequence over the cached tokens (Dao 2023, arXiv:2307.08691,
    algorithm 1). The queries of all sequences are packed without padding.

    q [T, Hq, D] may have any stride between tokens. The pages are dense and of q's dtype, or the pair
    (k_pages, v_pages). block_tables [S, P], lengths [S] and query_starts [S + 1] are integers. Rows query_starts[s] to
    query_starts[s + 1] of q are the last tokens of sequence s, and the last row sees all lengths[s] tokens. A sequence
    may have no query. Returns [T, Hq, D]. On a GPU the values of the integers are not checked."""
    _check_paged("prefill_attention", q, pages, block_tables, lengths)
    _check_query_starts(q.shape[0], lengths, query_starts)
    yield
    out = torch.empty_like(q)
    starts = query_starts.tolist()
    for row, length in enumerate(lengths.tolist()):
        queries = q[starts[row] : starts[row + 1]].transpose(0, 1)
        k, v = pages.gather(block_tables[row], length)
        out[starts[row] : starts[row + 1]] = _attended(queries[None], k[None], v[None], scale)[0]
    return out


def _fake_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    batch, heads, queries, dim = q.shape
    return q.new_empty(batch, queries, heads, dim)


@op(fake=_fake_attention)
def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Steps[Tensor]:
    """Causal attention (Dao 2023, arXiv:2307.08691) of the last Tq tokens of B sequences of equal length.

    q is [B, Hq, Tq, D]. k and v are [B, Hkv, Tk, D] and of q's dtype. Tk is at least Tq, and Hq is a multiple of Hkv.
    The last dimension is contiguous; the other strides are free. The last query sees all keys. Returns [B, Tq, Hq, D].
    A backward pass through this op raises, because it has no gradient."""
    check_tensor("attention", "q", q, ("B", "Hq", "Tq", "D"))
    batch, heads, queries, dim = q.shape
    check_tensor("attention", "k", k, (batch, "Hkv", "Tk", dim), like=q)
    check_tensor("attention", "v", v, tuple(k.shape), like=q)
    check_device("attention", q=q, k=k, v=v)
    kv_heads, keys = k.shape[1:3]
    if heads % kv_heads:
        raise ValueError(f"attention: q's {heads} heads must be a multiple of k's {kv_heads}")
    if keys < queries:
        raise ValueError(f"attention: k has {keys} tokens, fewer than q's {queries}")
    yield
    return _attended(q, k, v, scale)


def _attended(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The reference of `attention`, without its checks."""
    queries, keys = q.shape[2], k.shape[2]
    mask = None
    if 1 < queries < keys:  # Tk - Tq keys precede the queries: align the causal mask at the lower right
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    causal = queries == keys and queries > 1
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=True).transpose(1, 2)


def waits_for_host(num_q_heads: int, pages: Pages) -> bool:
    """Whether the reference runs decode_attention over these pages. The reference reads the lengths on the host, so a
    CUDA graph cannot capture it."""
    q = torch.empty(1, num_q_heads, pages.head_dim, dtype=pages.dtype, device=pages.device)
    one = torch.ones(1, 1, dtype=torch.int32, device=pages.device)
    return serving("decode_attention", q, q, pages, one, one[0], 1.0) is None


def _check_paged(op: str, q: Tensor, pages: Pages, block_tables: Tensor, lengths: Tensor) -> None:
    """Raises ValueError or TypeError unless these are valid arguments of an attention op over the paged cache."""
    check_tensor(op, "q", q, ("tokens", "Hq", "D"))
    check_pages(op, pages, like=q, head_dim=q.shape[-1])
    check_tensor(op, "lengths", lengths, ("S",), dtypes=INTEGERS)
    check_tensor(op, "block_tables", block_tables, (lengths.shape[0], "pages"), dtypes=INTEGERS)
    check_device(op, q=q, pages=pages, block_tables=block_tables, lengths=lengths)
    num_pages, page_size, num_kv_heads, _ = pages.shape
    if q.shape[1] % num_kv_heads:
        raise ValueError(f"{op}: q's {q.shape[1]} heads must be a multiple of the cache's {num_kv_heads}")
    check_range(op, "lengths", lengths, 1, block_tables.shape[1] * page_size + 1)
    if can_look_at(lengths):
        starts = torch.arange(block_tables.shape[1], device=lengths.device) * page_size
        check_range(op, "block_tables", block_tables[starts < lengths[:, None]], 0, num_pages)


def _check_query_starts(num_tokens: int, lengths: Tensor, query_starts: Tensor) -> None:
    """Raises ValueError unless query_starts divides the rows of q into the last tokens of each sequence. The values are
    checked on a CPU only."""
    check_tensor("prefill_attention", "query_starts", query_starts, (lengths.shape[0] + 1,), dtypes=INTEGERS)
    check_device("prefill_attention", lengths=lengths, query_starts=query_starts)
    if query_starts.device.type != "cpu":
        return
    counts = query_starts.diff()
    if query_starts[0] != 0 or query_starts[-1] != num_tokens or (counts < 0).any() or (counts > lengths).any():
        raise ValueError(
            f"prefill_attention: query_starts must rise from 0 to q's {num_tokens} rows, by no more than each "
            f"sequence's length, and is {query_starts.tolist()} for lengths {lengths.tolist()}"
        )
