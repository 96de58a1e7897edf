"""Attention of one query token a sequence over its paged cache, split over the cached tokens (flash decoding).

    out[s, h] = softmax(scale * q[s, h] . k[:, h // group]) v[:, h // group]     over the lengths[s] tokens of s

q is [S, Hq, D]. k_pages and v_pages are [num_pages, page_size, Hkv, D]. Token t of sequence s is row t % page_size of
the page block_tables[s, t // page_size]. The query heads of one key-value head share a tile: the cache is read once,
and the tensor cores get several rows. Scores and sums are float32. The softmax weights are rounded to v's dtype.

    program (p, kv head, sequence)              tokens ─────────────►
      sequence 0   ▒▒▒▒│▒▒▒▒│▒▒▒▒│▒▒▒▒│▒▒           a split is a run of whole tiles; its length follows from the
      sequence 1   ▒▒│▒▒│▒                          sequence's length only, so the kernel is batch-invariant;
                                                    program p computes the splits p, p + programs, ...

Each split writes a normalised result and the log2 of its sum of exponentials. A second kernel computes the weighted sum
of the splits. Bytes moved: 2 Hkv D elements for each cached token, q and out, and 8 D bytes for the partial result of
each head and split. The pages' format converts a tile of k or v to q's dtype where it loads it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..language import cast, dot, wait_for_inputs
from ..pages import Pages
from . import tuning
from .backend import MAX_PROGRAMS, TRITON, pdl_options, refuses_format
from .launching import planned
from .rope import HEAD_DIMS

LOG2_E = tl.constexpr(1.4426950408889634)
MAX_GROUP = 64


tuning.SPACES["decode_attention"] = {
    "BLOCK_N": (16, 32, 64),
    "NUM_SPLITS": (16, 32, 64, 128),
    "num_warps": (2, 4, 8),
    "num_stages": (2, 3, 4, 5),
}


@tuning.remember
def _config(device: tuning.Device, num_kv_heads: int, head_dim: int, page_size: int, itemsize: int) -> dict[str, Any]:
    """One long sequence gets as many splits as the device has multiprocessors for each key-value head. num_stages keeps
    up to three tiles in flight, as many as fit into half of the shared memory."""
    block_n = min(64 if itemsize == 2 else 32, page_size & -page_size)
    num_splits = min(128, max(1, device.num_sms // num_kv_heads))
    tile = 2 * block_n * head_dim * itemsize
    heuristic = {
        "BLOCK_N": block_n,
        "NUM_SPLITS": 1 << (num_splits.bit_length() - 1),
        "num_warps": 4,
        "num_stages": 1 + max(1, min(3, (device.shared_memory // 2 - 8192) // tile)),
    }
    if itemsize != 2:  # tuned tiles are for 2-byte values; 4-byte ones would not fit
        return heuristic
    sizes = {"num_kv_heads": num_kv_heads, "head_dim": head_dim, "page_size": page_size}
    config = tuning.lookup("decode_attention", device, sizes, heuristic)
    # The tuned entry may be for another page size. A tile must lie within one page.
    return config | {"BLOCK_N": min(config["BLOCK_N"], page_size & -page_size)}


@triton.jit
def _tokens_of_split(length, BLOCK_N: tl.constexpr, NUM_SPLITS: tl.constexpr):
    return tl.cdiv(tl.cdiv(length, BLOCK_N), NUM_SPLITS) * BLOCK_N


@triton.jit
def _split_of(length, split, BLOCK_N: tl.constexpr, NUM_SPLITS: tl.constexpr):
    """The first token of a split and the end of its tokens. A split that starts at the length or after it is empty."""
    tokens = _tokens_of_split(length, BLOCK_N, NUM_SPLITS)
    return split * tokens, tl.minimum(length, (split + 1) * tokens)


@planned
@triton.jit(do_not_specialize=["splits", "block_tables_stride"])  # they vary from call to call
def _decode_attention_kernel(
    out_ptr,  # [S, Hq, D], written here if there is one split
    parts_ptr,  # [S, Hq, splits, D] float32, or None if there is one split
    logs_ptr,  # [S, Hq, splits] float32, or None
    q_ptr,  # [S, Hq, D]
    pages,  # the named tuple of their format
    block_tables_ptr,  # [S, P]
    lengths_ptr,  # [S]
    splits,  # that parts and logs have room for
    page_size,
    q_stride,  # of a sequence; heads are dense
    block_tables_stride,
    scale,
    LOAD_K: tl.constexpr,  # of the pages' format
    LOAD_V: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):
    kv_head = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    num_kv_heads = tl.num_programs(1)
    wait_for_inputs(PDL)
    length = tl.load(lengths_ptr + sequence).to(tl.int32)

    group = tl.arange(0, BLOCK_G)[:, None]
    column = tl.arange(0, HEAD_DIM)[None, :]
    row = tl.arange(0, BLOCK_N)[:, None]
    dtype = q_ptr.dtype.element_ty
    table = block_tables_ptr + sequence * block_tables_stride
    q_heads = kv_head * GROUP + group
    head = sequence * num_kv_heads * GROUP + q_heads
    q = tl.load(q_ptr + sequence * q_stride + q_heads * HEAD_DIM + column, mask=group < GROUP, other=0.0)

    used = tl.cdiv(length, _tokens_of_split(length, BLOCK_N, NUM_SPLITS))
    for split in range(tl.program_id(0), used, tl.num_programs(0)):
        start, end = _split_of(length, split, BLOCK_N, NUM_SPLITS)
        best = tl.full([BLOCK_G], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_G], tl.float32)
        acc = tl.zeros([BLOCK_G, HEAD_DIM], tl.float32)
        page = tl.load(table + start // page_size).to(tl.int64)
        for tile in range(start, end, BLOCK_N):
            token = (tile % page_size + row).to(tl.int64)
            this_page = page
            # Load the next page number early, to hide its latency. The last one is loaded twice.
            page = tl.load(table + tl.minimum(tile + BLOCK_N, end - 1) // page_size).to(tl.int64)
            k = LOAD_K(pages, kv_head, this_page, token, column, tile + row < end)
            scores = dot(q, k.T, tl.zeros([BLOCK_G, BLOCK_N], tl.float32)) * (scale * LOG2_E)
            scores = tl.where(tile + tl.arange(0, BLOCK_N)[None, :] < end, scores, float("-inf"))
            new_best = tl.maximum(best, tl.max(scores, axis=1))
            weights = tl.exp2(scores - new_best[:, None])
            shrink = tl.exp2(best - new_best)
            total = total * shrink + tl.sum(weights, axis=1)
            v = LOAD_V(pages, kv_head, this_page, token, column, tile + row < end)
            acc = dot(cast(weights, dtype), v, acc * shrink[:, None])
            best = new_best

        acc = acc / total[:, None]
        if parts_ptr is None:
            tl.store(out_ptr + head * HEAD_DIM + column, cast(acc, dtype), mask=group < GROUP)
        else:
            at_part = head * splits + split
            tl.store(parts_ptr + at_part * HEAD_DIM + column, acc, mask=group < GROUP)
            tl.store(logs_ptr + at_part, (best + tl.log2(total))[:, None], mask=group < GROUP)


@planned
@triton.jit
def _combine_kernel(
    out_ptr,  # [S, Hq, D]
    parts_ptr,  # [S, Hq, splits, D] float32
    logs_ptr,  # [S, Hq, splits] float32
    lengths_ptr,  # [S]
    splits,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):
    sequence = tl.program_id(2).to(tl.int64)
    head = sequence * tl.num_programs(1) + tl.program_id(1)
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.arange(0, NUM_SPLITS)
    wait_for_inputs(PDL)
    length = tl.load(lengths_ptr + sequence).to(tl.int32)
    start, _ = _split_of(length, split, BLOCK_N, NUM_SPLITS)
    mask = start < length

    logs = tl.load(logs_ptr + head * splits + split, mask=mask, other=float("-inf"))
    weights = tl.exp2(logs - tl.max(logs, axis=0))
    at = (head * splits + split)[:, None] * HEAD_DIM + column[None, :]
    parts = tl.load(parts_ptr + at, mask=mask[:, None], other=0.0)
    out = tl.sum(weights[:, None] * parts, axis=0) / tl.sum(weights, axis=0)
    tl.store(out_ptr + head * HEAD_DIM + column, cast(out, out_ptr.dtype.element_ty))


def _launch_decode_attention(
    out: Tensor,
    parts: Tensor | None,
    logs: Tensor | None,
    q: Tensor,
    pages: Pages,
    block_tables: Tensor,
    lengths: Tensor,
    scale: float,
    page_size: int,
    config: dict[str, Any],
) -> None:
    """The pages may have any strides, if the last dimension is contiguous. The kernel takes ``page_size`` as the page
    size."""
    (num_sequences, num_q_heads, head_dim), num_kv_heads = q.shape, pages.num_kv_heads
    group = num_q_heads // num_kv_heads
    splits = 1 if logs is None else logs.shape[2]
    # At most 4 programs a multiprocessor, twice what it holds at a time. A captured step has splits for a whole
    # context, and most of them are empty.
    programs = min(splits, triton.cdiv(4 * tuning.device_of(q).num_sms, num_kv_heads * num_sequences))
    _decode_attention_kernel[(programs, num_kv_heads, num_sequences)](
        out,
        parts,
        logs,
        q,
        pages.triton_arguments(),
        block_tables,
        lengths,
        splits,
        page_size,
        q.stride(0),
        block_tables.stride(0),
        scale,
        LOAD_K=pages.triton_load_k,
        LOAD_V=pages.triton_load_v,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_G=max(16, triton.next_power_of_2(group)),
        **config,
        **pdl_options(q),
    )
    if parts is None:
        return
    block_d = min(head_dim, 64)
    _combine_kernel[(head_dim // block_d, num_q_heads, num_sequences)](
        out,
        parts,
        logs,
        lengths,
        splits,
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        BLOCK_N=config["BLOCK_N"],
        NUM_SPLITS=config["NUM_SPLITS"],
        num_warps=4,
        **pdl_options(q),
    )


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


def attend(q: Tensor, pages: Pages, block_tables: Tensor, lengths: Tensor, scale: float, page_size: int) -> Tensor:
    """decode_attention over pages of any strides, with ``page_size`` as the page size."""
    q = q if q.stride(1) == q.shape[2] else q.contiguous()
    num_kv_heads, head_dim = pages.num_kv_heads, pages.head_dim
    config = _config(tuning.device_of(q), num_kv_heads, head_dim, page_size, q.element_size())
    splits = min(config["NUM_SPLITS"], triton.cdiv(block_tables.shape[1] * page_size, config["BLOCK_N"]))
    out = q.new_empty(q.shape)
    parts = logs = None
    if splits > 1:
        parts = q.new_empty((*q.shape[:2], splits, head_dim), dtype=torch.float32)
        logs = q.new_empty((*q.shape[:2], splits), dtype=torch.float32)
    _launch_decode_attention(out, parts, logs, q, pages, block_tables, lengths, scale, page_size, config)
    return out


@TRITON.implements(lambda q, pages, *rest, **keywords: refuses_paged(q, pages, pages.page_size))
def decode_attention(q: Tensor, pages: Pages, block_tables: Tensor, lengths: Tensor, scale: float) -> Tensor:
    return attend(q, pages, block_tables, lengths, scale, pages.page_size)
