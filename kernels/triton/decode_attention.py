"""Attention of one query token a sequence over its paged cache, split over the cached tokens (flash decoding).

    out[s, h] = softmax(scale * q[s, h] . k[:, h // group]) v[:, h // group]     over the lengths[s] tokens of s

q is [S, Hq, D]. k_pages and v_pages are [num_pages, page_size, Hkv, D]. Token t of sequence s is row t % page_size of
the page block_tables[s, t // page_size]. The query heads of one key-value head share a tile: the cache is read once,
and the tensor cores get several rows. Scores and sums are float32. The softmax weights are rounded to v's dtype.

    program (p, kv head, sequence)              tokens ─────────────►
      sequence 0   ▒▒▒▒│▒▒▒▒│▒▒▒▒│▒▒▒▒│▒▒           a split is a run of whole tiles; its length follows from the
      sequence 1   ▒▒│▒▒│▒                          sequence's length only, so the kernel is batch-invariant;
      sequence 2   ▒                                program p computes the splits p, p + programs, ...

Each split writes a normalised result and the log2 of its sum of exponentials. A second kernel computes the weighted sum
of the splits (combine_splits.py). On an H100, for one sequence of 1,024 tokens of Qwen2.5-3B, two kernels took 5.8 and
1.9 us; one kernel, with the sum in the program that arrives last, took 15.8.

For a short sequence, the latencies of dependent loads take more time than the bytes. So a split has at least MIN_TOKENS
tokens. If the caller promises that earlier kernels do not change lengths and block tables
(dispatch.dependent_launches), a program reads them and prefetches its first tiles while the previous kernel still runs.

Bytes moved: 2 Hkv D elements for each cached token, q and out, and 8 D bytes for the partial result of each head and
split. The pages' format converts a tile of k or v to q's dtype as it loads the tile. If a format has a scale per token,
the scores are multiplied by those of k and the softmax weights by those of v, because k and v have more values.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import launches_dependently
from ..language import cast, divide, exp2, launch_dependents, log2, precise_dot, wait
from ..pages import Pages
from ..triton_if_any import INTERPRETED
from . import tuning
from .backend import MAX_PROGRAMS, TRITON, pdl_options, refuses_format
from .combine_splits import launch_combine, tokens_of_split
from .launching import planned
from .rope import HEAD_DIMS

LOG2_E = tl.constexpr(1.4426950408889634)
MAX_GROUP = 64
DENSE_PAGE = 64  # the page size for which a configuration is looked up where a sequence is one page

tuning.SPACES["decode_attention"] = {
    "BLOCK_N": (16, 32, 64),
    "NUM_SPLITS": (16, 32, 64, 128),
    "MIN_TOKENS": (64, 128, 256),
    "PREFETCH_TILES": (0, 1, 2, 4),
    "num_warps": (2, 4, 8),
    "num_stages": (2, 3, 4, 5),
}


@tuning.remember
def _config(device: tuning.Device, num_kv_heads: int, head_dim: int, page_size: int, itemsize: int) -> dict[str, Any]:
    """One long sequence gets multiprocessors / Hkv splits, rounded down to a power of two. num_stages keeps up to three
    tiles in flight, as many as fit into half of the shared memory.

    BLOCK_N, NUM_SPLITS, MIN_TOKENS and num_warps determine the order of summation. For batch invariance they do not
    depend on the number of sequences."""
    block_n = min(64 if itemsize == 2 else 32, page_size & -page_size)
    num_splits = min(128, max(1, device.num_sms // num_kv_heads))
    tile = 2 * block_n * head_dim * itemsize
    config = {
        "BLOCK_N": block_n,
        "NUM_SPLITS": 1 << (num_splits.bit_length() - 1),
        "MIN_TOKENS": 64,
        "PREFETCH_TILES": 1 if device.backend == "cuda" and not INTERPRETED else 0,
        "num_warps": 4,
        "num_stages": 1 + max(1, min(3, (device.shared_memory // 2 - 8192) // tile)),
    }
    if itemsize == 2:  # tuned tiles are for 2-byte values; 4-byte ones would not fit
        sizes = {"num_kv_heads": num_kv_heads, "head_dim": head_dim, "page_size": page_size}
        config = tuning.lookup("decode_attention", device, sizes, config)
    # The tuned entry may be for another page size. A tile must lie within one page, and a split has whole tiles.
    block_n = min(config["BLOCK_N"], page_size & -page_size)
    return config | {"BLOCK_N": block_n, "MIN_TOKENS": max(config["MIN_TOKENS"], block_n)}


@triton.jit
def _page_of(table, sequence, token, PAGE_SIZE: tl.constexpr):
    """The number of a token's page."""
    return sequence if PAGE_SIZE is None else tl.load(table + token // PAGE_SIZE).to(tl.int64)


@triton.jit
def _offset_in_page(token, BLOCK_N: tl.constexpr, PAGE_SIZE: tl.constexpr):
    """The offset in its page of a tile's first token. It is the constant 0 if a tile is a page."""
    if PAGE_SIZE is None:
        return token
    else:
        return 0 if BLOCK_N == PAGE_SIZE else token % PAGE_SIZE


@planned
@triton.jit(do_not_specialize=["num_tokens", "splits", "block_tables_stride"])  # these vary from call to call
def _decode_attention_kernel(
    out_ptr,  # [S, Hq, D], written here if there is one split
    parts_ptr,  # [S, Hq, splits, D] float32, or None if there is one split
    logs_ptr,  # [S, Hq, splits] float32, or None
    q_ptr,  # [S, Hq, D]
    pages,  # the named tuple of their format
    block_tables_ptr,  # [S, P], or None
    lengths_ptr,  # [S], or None: num_tokens each
    num_tokens,
    splits,  # the splits that fit in parts and logs
    q_stride,  # of a sequence; heads are dense
    block_tables_stride,
    scale,
    LOAD_K: tl.constexpr,  # of the pages' format
    LOAD_V: tl.constexpr,
    PREFETCH: tl.constexpr,
    SCALE_K: tl.constexpr,  # this and the next two are of the pages' format, too, or None
    SCALE_V: tl.constexpr,
    QUERY: tl.constexpr,
    PAGE_SIZE: tl.constexpr,  # None: sequence s is page s
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    MIN_TOKENS: tl.constexpr,
    PREFETCH_TILES: tl.constexpr,
    SETTLED: tl.constexpr,  # whether no kernel that may still run writes lengths and block tables
    PDL: tl.constexpr,
):
    kv_head = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    num_kv_heads = tl.num_programs(1)
    group = tl.arange(0, BLOCK_G)[:, None]
    column = tl.arange(0, HEAD_DIM)[None, :]
    row = tl.arange(0, BLOCK_N)[:, None]
    launch_dependents(PDL)
    if not SETTLED:
        wait(PDL)
    length = num_tokens
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + sequence).to(tl.int32)
    tokens = tokens_of_split(length, BLOCK_N, NUM_SPLITS, MIN_TOKENS)
    used = tl.cdiv(length, tokens)
    table = block_tables_ptr
    if PAGE_SIZE is not None:
        table += sequence * block_tables_stride
    first = tl.program_id(0) * tokens
    page = _page_of(table, sequence, tl.minimum(first, length - 1), PAGE_SIZE)
    if SETTLED:
        for i in tl.static_range(PREFETCH_TILES):
            tile = first + i * BLOCK_N
            its_page = _page_of(table, sequence, tl.minimum(tile, length - 1), PAGE_SIZE)
            token = (_offset_in_page(tile, BLOCK_N, PAGE_SIZE) + row).to(tl.int64)
            PREFETCH(pages, kv_head, its_page, token, tile + row < tl.minimum(length, first + tokens), HEAD_DIM)
        wait(PDL)
    if tl.program_id(0) >= used:
        return

    dtype = q_ptr.dtype.element_ty
    q_heads = kv_head * GROUP + group
    head = sequence * num_kv_heads * GROUP + q_heads
    q = tl.load(q_ptr + sequence * q_stride + q_heads * HEAD_DIM + column, mask=group < GROUP, other=0.0)
    if QUERY is not None:
        q = QUERY(pages, kv_head, q, column)

    for split in range(tl.program_id(0), used, tl.num_programs(0)):
        start, end = split * tokens, tl.minimum(length, (split + 1) * tokens)
        next_start = start + tl.num_programs(0) * tokens
        best = tl.full([BLOCK_G], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_G], tl.float32)
        acc = tl.zeros([BLOCK_G, HEAD_DIM], tl.float32)
        for tile in range(start, end, BLOCK_N):
            token = (_offset_in_page(tile, BLOCK_N, PAGE_SIZE) + row).to(tl.int64)
            this_page = page
            # Load the next page number early, to hide its latency. The last page number is loaded twice.
            following = tl.where(tile + BLOCK_N < end, tile + BLOCK_N, next_start)
            page = _page_of(table, sequence, tl.minimum(following, length - 1), PAGE_SIZE)
            k = LOAD_K(pages, kv_head, this_page, token, column, tile + row < end)
            v = LOAD_V(pages, kv_head, this_page, token, column, tile + row < end)
            scores = precise_dot(q, k.T, tl.zeros([BLOCK_G, BLOCK_N], tl.float32)) * (scale * LOG2_E)
            if SCALE_K is not None:
                its = (_offset_in_page(tile, BLOCK_N, PAGE_SIZE) + tl.arange(0, BLOCK_N)).to(tl.int64)
                seen = tile + tl.arange(0, BLOCK_N) < end
                scores *= SCALE_K(pages, kv_head, this_page, its, seen)[None, :]
            scores = tl.where(tile + tl.arange(0, BLOCK_N)[None, :] < end, scores, float("-inf"))
            new_best = tl.maximum(best, tl.max(scores, axis=1))
            weights = exp2(scores - new_best[:, None], dtype)
            shrink = exp2(best - new_best, dtype)
            total = total * shrink + tl.sum(weights, axis=1)
            if SCALE_V is not None:
                weights *= SCALE_V(pages, kv_head, this_page, its, seen)[None, :]
            acc = precise_dot(cast(weights, dtype), v, acc * shrink[:, None])
            best = new_best

        acc = divide(acc, total[:, None], dtype)
        if parts_ptr is None:
            tl.store(out_ptr + head * HEAD_DIM + column, cast(acc, dtype), mask=group < GROUP)
        else:
            at_part = head * splits + split
            tl.store(parts_ptr + at_part * HEAD_DIM + column, acc, mask=group < GROUP)
            tl.store(logs_ptr + at_part, (best + log2(total, dtype))[:, None], mask=group < GROUP)


def _launch_decode_attention(
    out: Tensor,
    parts: Tensor | None,
    logs: Tensor | None,
    q: Tensor,
    pages: Pages,
    block_tables: Tensor | None,
    lengths: Tensor | None,
    num_tokens: int,
    scale: float,
    config: dict[str, Any],
) -> None:
    (num_sequences, num_q_heads, head_dim), num_kv_heads = q.shape, pages.num_kv_heads
    group = num_q_heads // num_kv_heads
    splits = 1 if logs is None else logs.shape[2]
    # At most 4 programs per multiprocessor, twice as many as it holds at a time. A captured step has enough splits for
    # a whole context, and most of them are empty.
    programs = min(splits, triton.cdiv(4 * tuning.device_of(q).num_sms, num_kv_heads * num_sequences))
    options = pdl_options(q)
    settled = options["PDL"] and (launches_dependently() or tuning.is_offline())
    config = config if pages.triton_prefetch else config | {"PREFETCH_TILES": 0}
    _decode_attention_kernel[(programs, num_kv_heads, num_sequences)](
        out,
        parts,
        logs,
        q,
        pages.triton_arguments(),
        block_tables,
        lengths,
        num_tokens,
        splits,
        q.stride(0),
        0 if block_tables is None else block_tables.stride(0),
        scale,
        LOAD_K=pages.triton_load_k,
        LOAD_V=pages.triton_load_v,
        PREFETCH=pages.triton_prefetch,
        SCALE_K=pages.triton_scale_k,
        SCALE_V=pages.triton_scale_v,
        QUERY=pages.triton_query,
        PAGE_SIZE=None if block_tables is None else pages.page_size,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_G=max(16, triton.next_power_of_2(group)),
        SETTLED=settled,
        **config,
        **options,
    )
    if parts is not None and logs is not None:
        launch_combine(out, parts, logs, lengths, num_tokens, config, settled)


def refuses_paged(q: Tensor, pages: Pages, page_size: int) -> str | None:
    """The reason why this kernel does not run q over these pages with this page size, or None."""
    if reason := refuses_format("pages", pages, pages.triton_load_k):
        return reason
    if pages.head_dim not in HEAD_DIMS:
        return f"heads of {pages.head_dim} (16, 32, 64 or 128)"
    if page_size % 16:
        return f"pages of {page_size} tokens (a multiple of 16)"
    if q.shape[0] > MAX_PROGRAMS:
        return f"{q.shape[0]} sequences (at most {MAX_PROGRAMS})"
    if q.shape[1] // pages.num_kv_heads > MAX_GROUP:
        return f"{q.shape[1] // pages.num_kv_heads} query heads for one of the cache (at most {MAX_GROUP})"
    return None


def attend(
    q: Tensor, pages: Pages, block_tables: Tensor | None, lengths: Tensor | None, scale: float, num_tokens: int = 0
) -> Tensor:
    """decode_attention over pages of any strides, if the last dimension is contiguous. Without block_tables and
    lengths, page s has the ``num_tokens`` tokens of sequence s."""
    q = q if q.stride(1) == q.shape[2] else q.contiguous()
    (num_sequences, num_q_heads, head_dim), num_kv_heads = q.shape, pages.num_kv_heads
    page_size, most = DENSE_PAGE, num_tokens
    if block_tables is not None:
        page_size, most = pages.page_size, block_tables.shape[1] * pages.page_size
    config = _config(tuning.device_of(q), num_kv_heads, head_dim, page_size, q.element_size())
    splits = min(config["NUM_SPLITS"], triton.cdiv(most, config["MIN_TOKENS"]))
    out = q.new_empty(q.shape)
    parts = logs = None
    if splits > 1:
        parts = q.new_empty((num_sequences, num_q_heads, splits, head_dim), dtype=torch.float32)
        logs = q.new_empty((num_sequences, num_q_heads, splits), dtype=torch.float32)
    _launch_decode_attention(out, parts, logs, q, pages, block_tables, lengths, num_tokens, scale, config)
    return out


@TRITON.implements(lambda q, pages, *rest, **keywords: refuses_paged(q, pages, pages.page_size))
def decode_attention(q: Tensor, pages: Pages, block_tables: Tensor, lengths: Tensor, scale: float) -> Tensor:
    return attend(q, pages, block_tables, lengths, scale)
