"""Causal attention of several query tokens a sequence over its paged cache (FlashAttention's online softmax).

    out[i, h] = softmax(scale * q[i, h] . k[: p + 1, h // group]) v[: p + 1, h // group]     row i has position p

q is [T, Hq, D], with sequences packed without padding: rows query_starts[s] to query_starts[s + 1] are the last tokens
of sequence s; the cache has all its lengths[s] tokens. k_pages and v_pages are [num_pages, page_size, Hkv, D]. Token t
is row t % page_size of the page block_tables[s, t // page_size]. Scores and sums are float32. The softmax weights are
rounded to v's dtype. Operations: 4 Hq D for each pair of query and key; without a cached prefix, half of the pairs are
masked. Bytes moved: q, out, and 2 Hkv D elements for each cached token.

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
from .backend import MAX_PROGRAMS, TRITON, pdl_options, refuses_format
from .decode_attention import LOG2_E
from .launching import planned

HEAD_DIMS = (16, 32, 64, 128, 256)
SMALLEST_TILE = 32  # of BLOCK_M
LARGE_PAGE = 128  # if a sequence is one page, tiles are chosen as for pages of this size

tuning.SPACES["prefill_attention"] = {
    "BLOCK_M": (64, 128),
    "BLOCK_N": (32, 64, 128),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4),
    "ONE_LOOP": (0, 1),
}


@tuning.remember
def _config(device: tuning.Device, head_dim: int, page_size: int, itemsize: int) -> dict[str, Any]:
    """With more queries per tile, each key is used more often. A tile of keys is at most two pages.

    On sm_90 two CTAs of four warps run on an SM: while one computes its softmax, the tensor cores work for the other.
    One loop with a branch is faster there. On other devices, a branch between the two products would make Triton divide
    a tile of scores among warps along the keys, and exchange sums through shared memory."""
    block_m, block_n = (128, 64) if itemsize == 2 else (32, 16)  # float32 is for comparisons; its speed does not matter
    num_warps = 4 if itemsize != 2 and head_dim <= 64 else 8
    if head_dim > 128 and itemsize == 2:  # larger sums would not fit the registers
        block_m, block_n = 64, 32
    elif device.capability == 90 and itemsize == 2:
        block_m, num_warps = 64, 4
    block_n = _keys_of_tile(block_n, page_size)
    tiles = (device.shared_memory - 1024 - block_m * head_dim * itemsize) // (2 * block_n * head_dim * itemsize)
    in_flight = max(1, min(2 if head_dim <= 128 and itemsize == 2 else 1, tiles))  # tiles of keys; more would spill
    heuristic = {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "num_warps": num_warps,
        "num_stages": 1 + in_flight,
        "ONE_LOOP": int(device.capability == 90 and itemsize == 2),
    }
    if itemsize != 2:  # tuned tiles are for 2-byte values; 4-byte ones would not fit
        return heuristic
    config = tuning.lookup("prefill_attention", device, {"head_dim": head_dim, "page_size": page_size}, heuristic)
    # The tuned entry may be for another page size.
    return config | {"BLOCK_N": _keys_of_tile(config["BLOCK_N"], page_size)}


def _keys_of_tile(block_n: int, page_size: int) -> int:
    """A tile of keys lies within one page, or it is two whole pages."""
    power = page_size & -page_size
    return min(block_n, 2 * power if power == page_size else power)


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
def _pages_of(table, tile, last, BLOCK_N: tl.constexpr, PAGE_SIZE: tl.constexpr):
    """The numbers of a tile's pages: two if the tile is longer than a page. ``last`` is the sequence's last page."""
    page = tl.load(table + tl.minimum(tile // PAGE_SIZE, last)).to(tl.int64)
    second = page
    if BLOCK_N > PAGE_SIZE:
        second = tl.load(table + tl.minimum(tile // PAGE_SIZE + 1, last)).to(tl.int64)
    return page, second


@triton.jit
def _causal(scores, keys, positions):
    return tl.where(keys[None, :] <= positions[:, None], scores, float("-inf"))


@triton.jit
def _attend(
    acc,  # [BLOCK_M, D] float32
    total,  # [BLOCK_M] float32, sum of exponentials
    best,  # [BLOCK_M] float32, the largest score times factor
    q,  # [BLOCK_M, D]
    positions,  # [BLOCK_M]
    pages,  # the named tuple of their format
    kv_head,
    table,
    start,
    end,
    seen_by_all,  # all queries see the keys before this position
    factor,
    LOAD_K: tl.constexpr,  # of the pages' format
    LOAD_V: tl.constexpr,
    SCALE_K: tl.constexpr,  # this and the next are of the pages' format, too, or None
    SCALE_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE_SIZE: tl.constexpr,  # None: a sequence is one page
    ONE_LOOP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Adds the keys from start to end to the online softmax. Whole tiles that all queries see need no mask."""
    column = tl.arange(0, acc.shape[1])[None, :]
    row = tl.arange(0, BLOCK_N)
    SIZE: tl.constexpr = 2**30 if PAGE_SIZE is None else PAGE_SIZE
    last = tl.maximum(end - 1, 0) // SIZE
    page, second = _pages_of(table, start, last, BLOCK_N, SIZE)
    for tile in range(start, end, BLOCK_N):
        # If a tile is one or two pages, a row's offset in its page is the same in every iteration.
        offset = row % SIZE if BLOCK_N >= SIZE else tile % SIZE + row
        token = offset.to(tl.int64)[:, None]
        this_page = tl.where(row < SIZE, page, second)[:, None] if BLOCK_N > SIZE else page
        first, next_one = page, second
        # Load the next page numbers early, to hide their latency.
        page, second = _pages_of(table, tile + BLOCK_N, last, BLOCK_N, SIZE)
        mask = (row < end - tile)[:, None] if MASKED else None
        k = LOAD_K(pages, kv_head, this_page, token, column, mask)
        scores = dot(q, k.T, tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        if SCALE_K is not None:
            its_page = tl.where(row < SIZE, first, next_one) if BLOCK_N > SIZE else this_page
            seen = row < end - tile if MASKED else None
            scores *= SCALE_K(pages, kv_head, its_page, offset.to(tl.int64), seen)[None, :]
        if ONE_LOOP:
            if tile >= seen_by_all:
                scores = _causal(scores, tile + row, positions)
        elif MASKED:
            scores = _causal(scores, tile + row, positions)
        new_best = tl.maximum(best, tl.max(scores, axis=1) * factor)
        weights = tl.exp2(tl.fma(scores, factor, -new_best[:, None]))
        shrink = tl.exp2(best - new_best)  # exactly 1 if the maximum stays the same
        total = total * shrink + tl.sum(weights, axis=1)
        v = LOAD_V(pages, kv_head, this_page, token, column, mask)
        if SCALE_V is not None:
            weights *= SCALE_V(pages, kv_head, its_page, offset.to(tl.int64), seen)[None, :]
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
    q_stride,  # of a token; heads are dense
    block_tables_stride,
    factor,  # scores are multiplied by it; positive, and includes log2(e), because the softmax uses powers of 2
    LOAD_K: tl.constexpr,  # of the pages' format
    LOAD_V: tl.constexpr,
    SCALE_K: tl.constexpr,  # this and the next two are of the pages' format, too, or None
    SCALE_V: tl.constexpr,
    QUERY: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE_SIZE: tl.constexpr,  # None: a sequence is one page
    ONE_LOOP: tl.constexpr,
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
    # The rows beyond the last query compute the last query again; their results are not stored.
    positions = tl.minimum(rows, query_end - 1) - query_end + length
    column = tl.arange(0, HEAD_DIM)[None, :]
    at = tl.minimum(rows, query_end - 1).to(tl.int64)[:, None]
    q = tl.load(q_ptr + at * q_stride + head * HEAD_DIM + column)
    if QUERY is not None:
        q = QUERY(pages, head // GROUP, q, column)

    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    table = block_tables_ptr + sequence.to(tl.int64) * block_tables_stride
    seen_by_all = (first - query_end + length + 1) // BLOCK_N * BLOCK_N
    seen_by_last = tl.minimum(first + BLOCK_M, query_end) - query_end + length
    kv_head = head // GROUP
    if ONE_LOOP:
        acc, total, best = _attend(
            acc, total, best, q, positions, pages, kv_head, table, 0, seen_by_last, seen_by_all, factor,
            LOAD_K, LOAD_V, SCALE_K, SCALE_V, BLOCK_M, BLOCK_N, PAGE_SIZE, ONE_LOOP, True,
        )  # fmt: skip
    else:
        acc, total, best = _attend(
            acc, total, best, q, positions, pages, kv_head, table, 0, seen_by_all, seen_by_all, factor,
            LOAD_K, LOAD_V, SCALE_K, SCALE_V, BLOCK_M, BLOCK_N, PAGE_SIZE, ONE_LOOP, False,
        )  # fmt: skip
        acc, total, best = _attend(
            acc, total, best, q, positions, pages, kv_head, table, seen_by_all, seen_by_last, seen_by_all, factor,
            LOAD_K, LOAD_V, SCALE_K, SCALE_V, BLOCK_M, BLOCK_N, PAGE_SIZE, ONE_LOOP, True,
        )  # fmt: skip

    out = cast(acc / total[:, None], out_ptr.dtype.element_ty)
    out_at = (rows.to(tl.int64)[:, None] * num_q_heads + head) * HEAD_DIM + column
    tl.store(out_ptr + out_at, out, mask=(rows < query_end)[:, None])


def refuses_paged(q: Tensor, pages: Pages, page_size: int, num_sequences: int) -> str | None:
    """The reason why this kernel does not run q over these pages with this page size, or None."""
    if reason := refuses_format("pages", pages, pages.triton_load_k):
        return reason
    if q.shape[2] not in HEAD_DIMS:
        return f"heads of {q.shape[2]} (16, 32, 64, 128 or 256)"
    if len(q) // SMALLEST_TILE + num_sequences > MAX_PROGRAMS:
        return f"{len(q)} tokens of {num_sequences} sequences (at most {MAX_PROGRAMS} tiles of {SMALLEST_TILE} tokens)"
    return f"pages of {page_size} tokens (a multiple of 16)" if page_size % 16 else None


def attend(
    q: Tensor,
    pages: Pages,
    block_tables: Tensor,
    lengths: Tensor,
    query_starts: Tensor,
    scale: float,
    page_size: int | None,
) -> Tensor:
    """prefill_attention over pages of any strides, if the last dimension is contiguous. The kernel takes ``page_size``
    as the page size. Without one, each sequence is one page."""
    q = q if q.stride(1) == q.shape[2] else q.contiguous()
    if scale < 0:  # the kernel takes the maximum of the scores before it multiplies them by the factor
        q, scale = -q, -scale
    out = q.new_empty(q.shape)
    (num_tokens, num_q_heads, head_dim), num_kv_heads = q.shape, pages.num_kv_heads
    device = tuning.device_of(q)
    config = _config(device, head_dim, page_size or LARGE_PAGE, q.element_size())
    if pages.triton_most_keys and device.capability != 90:
        config = config | {"BLOCK_N": min(config["BLOCK_N"], pages.triton_most_keys)}
    tiles = num_tokens // config["BLOCK_M"] + len(lengths)
    _prefill_attention_kernel[(num_q_heads, tiles)](
        out,
        q,
        pages.triton_arguments(),
        block_tables,
        lengths,
        query_starts,
        len(lengths),
        q.stride(0),
        block_tables.stride(0),
        max(scale, 1e-30) * LOG2_E.value,  # a masked score is -inf, and -inf times 0 would be NaN
        LOAD_K=pages.triton_load_k,
        LOAD_V=pages.triton_load_v,
        SCALE_K=pages.triton_scale_k,
        SCALE_V=pages.triton_scale_v,
        QUERY=pages.triton_query,
        GROUP=num_q_heads // num_kv_heads,
        HEAD_DIM=head_dim,
        PAGE_SIZE=page_size,
        **config,
        **pdl_options(q),
    )
    return out


def _refuses(
    q: Tensor, pages: Pages, block_tables: Tensor, lengths: Tensor, query_starts: Tensor, scale: float
) -> str | None:
    return refuses_paged(q, pages, pages.page_size, len(lengths))


@TRITON.implements(_refuses)
def prefill_attention(
    q: Tensor, pages: Pages, block_tables: Tensor, lengths: Tensor, query_starts: Tensor, scale: float
) -> Tensor:
    return attend(q, pages, block_tables, lengths, query_starts, scale, pages.page_size)
