"""decode_attention against its reference."""

from __future__ import annotations

import importlib

import pytest
import torch
from support.mutations import Mutation
from support.paged import paged_cache
from support.references import assert_matches_reference, guarded_allocations, random

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
HEADS = {"0.5B": (14, 2, 64), "1.5B": (12, 2, 128), "3B": (16, 2, 128), "7B": (28, 4, 128), "14B": (40, 8, 128)}
HEADS |= {"72B": (64, 8, 128), "multi-head": (3, 3, 32), "multi-query": (20, 1, 16)}


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
def test_heads_of_the_family(ops, device, heads):
    assert_matches_reference(ops, "decode_attention", *_inputs([65, 1, 130], heads, torch.bfloat16, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("page_size", [16, 64, 128])
def test_ragged_lengths(ops, device, page_size, dtype):
    lengths = [1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200]
    assert_matches_reference(ops, "decode_attention", *_inputs(lengths, (7, 1, 64), dtype, device, page_size))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_tiles_a_split(ops, device, dtype):
    """Eight heads leave 16 splits on an H100: 1,100 tokens are more tiles than that."""
    assert_matches_reference(ops, "decode_attention", *_inputs([1100, 70], (8, 8, 32), dtype, device))


@pytest.mark.slow
def test_several_splits_a_program(ops, device):
    """11 sequences of 16 heads leave 3 programs for the 5 splits of the longest on an H100."""
    lengths = [1, 64, 65, 128, 129, 192, 193, 256, 257, 300, 320]
    assert_matches_reference(ops, "decode_attention", *_inputs(lengths, (16, 16, 16), torch.bfloat16, device))


def test_attention(ops, device):
    """Contiguous keys and values, each sequence a page."""
    q, k, v = (
        random(2, *shape, 16, dtype=torch.bfloat16, device=device, seed=15) for shape in ((4, 1), *[(2, 130)] * 2)
    )
    assert_matches_reference(ops, "attention", q, k, v, 0.25)


@pytest.mark.parametrize("spare_pages", [0, 1])
@pytest.mark.parametrize("length", [1, 40, 64])
def test_one_split(ops, device, length, spare_pages):
    """Where a table has room for one tile, no parts are left behind."""
    inputs = _inputs([length, 3], (6, 2, 64), torch.bfloat16, device, spare_pages=spare_pages)
    assert_matches_reference(ops, "decode_attention", *inputs)


def test_bits_are_batch_invariant(ops, device):
    """Alone and in a narrow table, or among others in a wide one; also where a split has several tiles, and where
    there are fewer programs than splits."""
    q, pages, tables, lengths, scale = _inputs([1, 64, 65, 300], (8, 8, 32), torch.bfloat16, device, spare_pages=3)
    pages = pages.tensors
    tuning = importlib.import_module(f"{ops.__name__}.triton.tuning")
    for config in ({}, {"NUM_SPLITS": 2}, {"MIN_TOKENS": 128}):
        with tuning.trying("decode_attention", config):
            together = ops.decode_attention(q, pages, tables, lengths, scale)
            for row, length in enumerate(lengths.tolist()):
                own = tables[row : row + 1, : -(-length // 64)].contiguous()
                alone = ops.decode_attention(q[row : row + 1], pages, own, lengths[row : row + 1], scale)
                assert torch.equal(alone[0], together[row])
    many = [each.repeat(5, *[1] * (each.dim() - 1)) for each in (q, tables, lengths)]
    assert torch.equal(
        ops.decode_attention(many[0], pages, *many[1:], scale)[-4:],
        ops.decode_attention(q, pages, tables, lengths, scale),
    )


def test_rows_of_one_sequence_are_as_one_by_one(ops, device):
    """Several tokens of a sequence are rows of one table, with lengths that rise by one. A row has the bits that it has
    before the tokens behind it are in the cache."""
    _, pages, tables, _, scale = _inputs([131], (4, 2, 32), torch.bfloat16, device)
    lengths = torch.arange(126, 132, dtype=torch.int32, device=device)
    q = random(len(lengths), 4, 32, dtype=torch.bfloat16, device=device, seed=14)
    together = ops.decode_attention(q, pages, tables.expand(len(q), -1), lengths, scale)
    for row, length in reversed(list(enumerate(lengths.tolist()))):
        alone = ops.decode_attention(q[row : row + 1], pages, tables, lengths[row : row + 1], scale)
        assert torch.isfinite(alone).all()
        assert torch.equal(alone[0], together[row])
        for each in pages.tensors:
            each[tables[0, (length - 1) // 64], (length - 1) % 64] = float("nan")


@pytest.mark.parametrize("size", [300.0, 1e-3])
def test_scores_of_any_size(ops, device, size):
    """Large ones would overflow an exponential without the maximum; small ones weigh all tokens alike."""
    q, *rest = _inputs([65, 200], (4, 2, 64), torch.float32, device)
    assert_matches_reference(ops, "decode_attention", q * size, *rest)


def test_strided_queries(ops, device):
    q, *rest = _inputs([65, 20], (4, 2, 64), torch.bfloat16, device)
    qkv = torch.cat((q.flatten(1), torch.full((2, 256), float("nan"), dtype=q.dtype, device=device)), dim=1)
    view = qkv.unflatten(1, (-1, 64))[:, :4]
    assert torch.equal(ops.decode_attention(view, *rest), ops.decode_attention(q, *rest))


def test_pages_beyond_two_to_the_31(ops, device):
    """Only the pages touched take memory. Broken, it would read elsewhere, so no mutation tries that."""
    q, pages, tables, lengths, scale = _inputs([100], (2, 1, 128), torch.bfloat16, device)
    far = 2**31 // (64 * 128) + 7
    k_far, v_far = (torch.empty(far + 3, 64, 1, 128, dtype=q.dtype, device=device) for _ in range(2))
    k_far[far : far + 3], v_far[far : far + 3] = pages.tensors
    out = ops.decode_attention(q, (k_far, v_far), tables + far, lengths, scale)
    assert torch.equal(out, ops.decode_attention(q, pages, tables, lengths, scale))


@pytest.mark.gpu
def test_races(ops):
    device = torch.device("cuda")
    inputs = _inputs([1, 100, 1000, 5000], (16, 2, 128), torch.bfloat16, device)
    first = assert_matches_reference(ops, "decode_attention", *inputs)
    for _ in range(250):
        assert torch.equal(ops.decode_attention(*inputs), first)


@pytest.mark.parametrize(
    ("at", "change", "message"),
    [
        (0, lambda q: q[:1], "q has 1 rows, and lengths says 2 sequences"),
        (0, lambda q: q[:, :3], "q's 3 heads must be a multiple of the cache's 2"),
        (0, lambda q: q.half(), "k_pages must be float16, and is float32"),
        (0, lambda q: q[0], r"q must have shape \[tokens, Hq, D\], and has \[4, 32\]"),
        (1, lambda pages: (pages.k[..., :16], pages.v), r"k_pages must have shape \[pages, page size, Hkv, 32\]"),
        (1, lambda pages: (pages.k.transpose(0, 1), pages.v), "k_pages must be contiguous"),
        (1, lambda pages: (pages.k, pages.v[:1]), "v_pages must have shape"),
        (2, lambda tables: tables[:1], r"block_tables must have shape \[2, pages\], and has \[1, 2\]"),
        (2, lambda tables: tables + 100, "block_tables must be within 0 and 3, and one is 10"),
        (2, lambda tables: tables.float(), "block_tables must be int32 or int64, and is float32"),
        (3, lambda lengths: lengths * 0, "lengths must be within 1 and 128, and one is 0"),
        (3, lambda lengths: lengths + 100, "lengths must be within 1 and 128, and one is 165"),
        (3, lambda lengths: lengths[:0], "lengths is empty"),
    ],
)
def test_bad_input(ops, at, change, message):
    inputs = list(_inputs([65, 20], (4, 2, 32), torch.float32, torch.device("cpu"), spare_pages=0))
    inputs[at] = change(inputs[at])
    with pytest.raises((TypeError, ValueError), match=message):
        ops.decode_attention(*inputs)


@pytest.mark.parametrize(("heads", "page_size"), [((2, 1, 80), 64), ((2, 1, 64), 24)])
def test_other_sizes_run_on_the_reference(ops, device, heads, page_size):
    with guarded_allocations():
        out = ops.decode_attention(*_inputs([40, 3], heads, torch.float32, device, page_size))
    assert torch.isfinite(out).all()


def test_registration(ops, device):
    q, pages, *rest = _inputs([20, 3], (2, 1, 16), torch.float32, device, 16)
    torch.library.opcheck(torch.ops.qwenkern.decode_attention, (q, list(pages.tensors), *rest))


def _inputs(lengths, heads, dtype, device, page_size=64, spare_pages=1):
    num_q_heads, num_kv_heads, head_dim = heads
    q = random(len(lengths), num_q_heads, head_dim, dtype=dtype, device=device, seed=13)
    return q, *paged_cache(lengths, num_kv_heads, head_dim, page_size, dtype, device, spare_pages), head_dim**-0.5


_RAGGED = {"page_size": 64, "dtype": torch.float32}
_SPLITS = {"dtype": torch.float32}
_3B = {"heads": (16, 2, 128)}
FILE, COMBINE = "triton/decode_attention.py", "triton/combine_splits.py"
MUTATIONS = [
    Mutation(
        "only the first split of each program", FILE, "range(tl.program_id(0), used, tl.num_programs(0))",
        "range(tl.program_id(0), used, used)", test_several_splits_a_program, {},
    ),
    Mutation(
        "the page of the next split in its place", FILE, "next_start = start + tl.num_programs(0) * tokens",
        "next_start = start + tokens", test_several_splits_a_program, {},
    ),
    Mutation(
        "heads of another group", FILE, "q_heads = kv_head * GROUP + group", "q_heads = group * 2 + kv_head",
        test_heads_of_the_family, _3B,
    ),
    Mutation(
        "tokens beyond the length", FILE, "tl.where(tile + tl.arange(0, BLOCK_N)[None, :] < end, scores",
        "tl.where(tile + tl.arange(0, BLOCK_N)[None, :] >= 0, scores", test_ragged_lengths, _RAGGED,
    ),
    Mutation(
        "v beyond the length", FILE, "v = LOAD_V(pages, kv_head, this_page, token, column, tile + row < end)",
        "v = LOAD_V(pages, kv_head, this_page, token, column, None)", test_ragged_lengths, _RAGGED,
    ),
    Mutation("sum not rescaled", FILE, "total = total * shrink", "total = total", test_several_tiles_a_split, _SPLITS),
    Mutation("result not rescaled", FILE, "acc * shrink[:, None])", "acc)", test_several_tiles_a_split, _SPLITS),
    Mutation(
        "the same page again", FILE, "tl.minimum(following, length - 1)", "tile", test_several_tiles_a_split, _SPLITS
    ),
    Mutation(
        "each tile from the start of its page", FILE, "0 if BLOCK_N == PAGE_SIZE else token % PAGE_SIZE", "0",
        test_ragged_lengths, {"page_size": 128, "dtype": torch.float32},
    ),
    Mutation("the first sequence's page", FILE, "return sequence if", "return sequence * 0 if", test_attention, {}),
    Mutation(
        "splits weighed alike", COMBINE, "exp2(logs - tl.max(logs, axis=0), dtype)", "tl.where(mask, 1.0, 0.0)",
        test_ragged_lengths, _RAGGED,
    ),
    Mutation("logarithm of the sum forgotten", FILE, "best + log2(total, dtype)", "best", test_ragged_lengths, _RAGGED),
    Mutation("natural exponential", FILE, "(scale * LOG2_E)", "scale", test_ragged_lengths, _RAGGED),
    Mutation(
        "splits by the table", COMBINE, "NUM_SPLITS) * BLOCK_N", "tl.num_programs(0)) * BLOCK_N",
        test_bits_are_batch_invariant, {},
    ),
]  # fmt: skip
