"""Causal attention of several query tokens a sequence over its paged cache (FlashAttention's online softmax).

    out[i, h] = softmax(scale * q[i, h] . k[: p + 1, h // group]) v[: p + 1, h // group]     row i has position p

q is [T, Hq, D], with sequences packed without padding: rows query_starts[s] to query_starts[s + 1] are the last tokens
of sequence s, of which the cache has lengths[s]. k_pages and v_pages are [num_pages, page_size, Hkv, D]. Token t is row
t % page_size of the page block_tables[s, t // page_size]. Scores and sums are float32. The softmax weights are rounded
to v's dtype. Operations: 4 Hq D for each pair of query and key; without a cached prefix, half of the pairs are masked.
Bytes moved: q, out, and 2 Hkv D elements for each cached token.

    program (head, tile)          keys ───────────►
      tile of sequence 0          ▒▒▒▒▒▒▒▒▚              ▒ whole tiles without a mask, ▚ the diagonal with a mask
      next tile of it             ▒▒▒▒▒▒▒▒▒▒▒▒▚
      tile of sequence 1          ▒▒▚

The host computes the grid without reading query_starts, which lies on the GPU: T // BLOCK_M + S tiles are always
enough. Each program searches query_starts for its sequence.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..language import cast, dot, wait_for_inputs
from ..pages import Pages
from . import tuning
from .backend import TRITON, pdl_options, refuses_format
from .decode_attention import LOG2_E
from .launching import planned

HEAD_DIMS = (16, 32, 64, 128, 256)

tuning.SPACES["prefill_attention"] = {
    "BLOCK_M": (64, 128),
    "BLOCK_N": (32, 64),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4),
}


@tuning.remember
def _config(device: tuning.Device, head_dim: int, page_size: int, itemsize: int) -> dict[str, Any]:
    """The largest tiles that fit. More queries a tile reuse each key more often; a tile of keys is at most a page."""
    block_m, block_n = (128, 64) if itemsize == 2 else (32, 16)  # float32 is for comparisons; its speed does not matter
    if head_dim > 128 and itemsize == 2:  # larger sums would not fit the registers
        block_m, block_n = 64, 32
    block_n = min(block_n, page_size & -page_size)
    tiles = (device.shared_memory - 1024 - block_m * head_dim * itemsize) // (2 * block_n * head_dim * itemsize)
    # Two tiles of keys in flight for heads of 128, the family's usual size. With smaller heads two tiles spill
    # registers on sm_100; with larger heads they do not fit.
    in_flight = max(1, min(2 if head_dim == 128 else 1, tiles))
    heuristic = {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "num_warps": 4 if itemsize != 2 and head_dim <= 64 else 8,
        "num_stages": 1 + in_flight,
    }
    if itemsize != 2:  # tuned tiles are for 2-byte values; 4-byte ones would not fit
        return heuristic
    config = tuning.lookup("prefill_attention", device, {"head_dim": head_dim, "page_size": page_size}, heuristic)
    # The tuned entry may be for another page size. A tile must lie within one page.
    return config | {"BLOCK_N": min(config["BLOCK_N"], page_size & -page_size)}


@triton.jit
def _sequence_of(query_starts_ptr, num_sequences, tile, BLOCK_M: tl.constexpr):
    """The sequence of a tile: the last one whose first tile is not after it. The first tile of sequence s is
    query_starts[s] // BLOCK_M + s, which gives every sequence enough tiles."""
    low = 0
    high = num_sequences
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(query_starts_ptr + middle).to(tl.int32) // BLOCK_M + middle <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _attend(
    acc,  # [BLOCK_M, D] float32
    total,  # [BLOCK_M] float32, sum of exponentials
    best,  # [BLOCK_M] float32, largest score
    q,  # [BLOCK_M, D]
    positions,  # [BLOCK_M]
    pages,  # the named tuple of their format
    kv_head,
    table,
    page_size,
    start,
    end,
    scale,
    LOAD_K: tl.constexpr,  # of the pages' format
    LOAD_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Adds the keys from start to end to the online softmax. Whole tiles that all queries see need no mask."""
    column = tl.arange(0, acc.shape[1])[None, :]
    row = tl.arange(0, BLOCK_N)
    page = tl.load(table + start // page_size, mask=start < end, other=0).to(tl.int64)
    for tile in range(start, end, BLOCK_N):
        token = (tile % page_size + row).to(tl.int64)[:, None]
        this_page = page
        # Load the next page number early, to hide its latency. The last one is loaded twice.
        page = tl.load(table + tl.minimum(tile + BLOCK_N, end - 1) // page_size).to(tl.int64)
        mask = (tile + row < end)[:, None] if MASKED else None
        k = LOAD_K(pages, kv_head, this_page, token, column, mask)
        scores = dot(q, k.T, tl.zeros([BLOCK_M, BLOCK_N], tl.float32)) * (scale * LOG2_E)
        if MASKED:
            scores = tl.where((tile + row)[None, :] <= positions[:, None], scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_best[:, None])
        shrink = tl.exp2(best - new_best)
        total = total * shrink + tl.sum(weights, axis=1)
        v = LOAD_V(pages, kv_head, this_page, token, column, mask)
        acc = dot(cast(weights, q.dtype), v, acc * shrink[:, None])
        best = new_best
    return acc, total, best


@planned
@triton.jit(do_not_specialize=["block_tables_stride"])
def _prefill_attention_kernel(
    out_ptr,  # [T, Hq, D]
    q_ptr,  # [T, Hq, D]
    pages,  # the named tuple of their format
    block_tables_ptr,  # [S, P]
    lengths_ptr,  # [S]
    query_starts_ptr,  # [S + 1]
    num_sequences,
    page_size,
    q_stride,  # of a token; heads are dense
    block_tables_stride,
    scale,
    LOAD_K: tl.constexpr,  # of the pages' format
    LOAD_V: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    head = tl.program_id(0)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)  # later queries see more keys, so their tiles start first
    num_q_heads = tl.num_programs(0)
    wait_for_inputs(PDL)
    sequence = _sequence_of(query_starts_ptr, num_sequences, tile, BLOCK_M)
    query_start = tl.load(query_starts_ptr + sequence).to(tl.int32)
    query_end = tl.load(query_starts_ptr + sequence + 1).to(tl.int32)
    first = query_start + (tile - query_start // BLOCK_M - sequence) * BLOCK_M
    if first >= query_end:
        return

    length = tl.load(lengths_ptr + sequence).to(tl.int32)
    rows = first + tl.arange(0, BLOCK_M)
    # Rows beyond the last query compute the last query again; their results are not stored.
    positions = tl.minimum(rows, query_end - 1) - query_end + length
    column = tl.arange(0, HEAD_DIM)[None, :]
    at = tl.minimum(rows, query_end - 1).to(tl.int64)[:, None]
    q = tl.load(q_ptr + at * q_stride + head * HEAD_DIM + column)

    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    table = block_tables_ptr + sequence.to(tl.int64) * block_tables_stride
    seen_by_all = (first - query_end + length + 1) // BLOCK_N * BLOCK_N
    seen_by_last = tl.minimum(first + BLOCK_M, query_end) - query_end + length
    acc, total, best = _attend(
        acc, total, best, q, positions, pages, head // GROUP, table, page_size,
        0, seen_by_all, scale, LOAD_K, LOAD_V, BLOCK_M, BLOCK_N, False,
    )  # fmt: skip
    acc, total, best = _attend(
        acc, total, best, q, positions, pages, head // GROUP, table, page_size,
        seen_by_all, seen_by_last, scale, LOAD_K, LOAD_V, BLOCK_M, BLOCK_N, True,
    )  # fmt: skip

    out = cast(acc / total[:, None], out_ptr.dtype.element_ty)
    out_at = (rows.to(tl.int64)[:, None] * num_q_heads + head) * HEAD_DIM + column
    tl.store(out_ptr + out_at, out, mask=(rows < query_end)[:, None])


def _launch_prefill_attention(
    out: Tensor,
    q: Tensor,
    pages: Pages,
    block_tables: Tensor,
    lengths: Tensor,
    query_starts: Tensor,
    scale: float,
    page_size: int,
) -> None:
    """The pages may have any strides, if the last dimension is contiguous. The kernel takes ``page_size`` as the page
    size."""
    (num_tokens, num_q_heads, head_dim), num_kv_heads = q.shape, pages.num_kv_heads
    config = _config(tuning.device_of(q), head_dim, page_size, q.element_size())
    tiles = num_tokens // config["BLOCK_M"] + len(lengths)
    _prefill_attention_kernel[(num_q_heads, tiles)](
        out,
        q,
        pages.triton_arguments(),
        block_tables,
        lengths,
        query_starts,
        len(lengths),
        page_size,
        q.stride(0),
        block_tables.stride(0),
        scale,
        LOAD_K=pages.triton_load_k,
        LOAD_V=pages.triton_load_v,
        GROUP=num_q_heads // num_kv_heads,
        HEAD_DIM=head_dim,
        **config,
        **pdl_options(q),
    )


def refuses_paged(q: Tensor, pages: Pages, page_size: int) -> str | None:
    """The reason why this kernel does not run q over these pages with this page size, or None."""
    if reason := refuses_format("pages", pages, pages.triton_load_k):
        return reason
    if q.shape[2] not in HEAD_DIMS:
        return f"heads of {q.shape[2]} (16, 32, 64, 128 or 256)"
    return f"pages of {page_size} tokens (a multiple of 16)" if page_size % 16 else None


def attend(
    q: Tensor,
    pages: Pages,
    block_tables: Tensor,
    lengths: Tensor,
    query_starts: Tensor,
    scale: float,
    page_size: int,
) -> Tensor:
    """prefill_attention over pages of any strides, with ``page_size`` as the page size."""
    q = q if q.stride(1) == q.shape[2] else q.contiguous()
    out = q.new_empty(q.shape)
    _launch_prefill_attention(out, q, pages, block_tables, lengths, query_starts, scale, page_size)
    return out


@TRITON.implements(lambda q, pages, *rest, **keywords: refuses_paged(q, pages, pages.page_size))
def prefill_attention(
    q: Tensor, pages: Pages, block_tables: Tensor, lengths: Tensor, query_starts: Tensor, scale: float
) -> Tensor:
    return attend(q, pages, block_tables, lengths, query_starts, scale, pages.page_size)
