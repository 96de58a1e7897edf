"""prefill_attention against its reference."""

from __future__ import annotations

import importlib

import pytest
import torch
from support.interpreter import round_products_once
from support.mutations import Mutation
from support.paged import paged_cache
from support.references import assert_matches_reference, random

from qwenkern.kernels import reference

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
HEADS = {"0.5B": (14, 2, 64), "1.5B": (12, 2, 128), "3B": (16, 2, 128), "7B": (28, 4, 128), "72B": (64, 8, 128)}
HEADS |= {"multi-head": (3, 3, 32), "multi-query": (20, 1, 16), "wide": (2, 1, 256)}
PREFIXES = [(page, prefix) for page in (16, 64, 128) for prefix in (0, 1, page - 1, page, page + 1)]


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
def test_heads_of_the_family(ops, device, heads):
    assert_matches_reference(ops, "prefill_attention", *_inputs([(70, 70), (3, 67)], heads, torch.bfloat16, device))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_heads_in_other_dtypes(ops, device, head_dim, dtype):
    assert_matches_reference(ops, "prefill_attention", *_inputs([(33, 70)], (7, 1, head_dim), dtype, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("page_size", "prefix"), PREFIXES)
def test_cached_prefixes(ops, device, page_size, prefix, dtype):
    """Tiles of 128 queries and 64 keys (32 and 16 in float32): one less, whole, one more, and several."""
    counts = [1, 31, 32, 33, 65] if dtype == torch.float32 else [1, 127, 128, 129, 257]
    parts = [(count, count + prefix) for count in counts]
    assert_matches_reference(ops, "prefill_attention", *_inputs(parts, (2, 1, 16), dtype, device, page_size))


def test_ragged_batch(ops, device):
    """One token between long ones, none at all, and tiles that begin anywhere."""
    parts = [(300, 300), (1, 200), (0, 50), (5, 5), (130, 190), (1, 1), (0, 7), (40, 41)]
    assert_matches_reference(ops, "prefill_attention", *_inputs(parts, (4, 2, 32), torch.bfloat16, device))


def test_many_short_sequences(ops, device):
    parts = [(1 + index % 3, 5 + index % 3) for index in range(70)]
    assert_matches_reference(ops, "prefill_attention", *_inputs(parts, (2, 1, 16), torch.float32, device, page_size=16))


@pytest.mark.parametrize("one_loop", [0, 1])
def test_loops(ops, device, one_loop):
    """Keys that all queries see and keys that only some see, in one loop with a branch or in two."""
    inputs = _inputs([(130, 290), (3, 3), (64, 64)], (3, 3, 32), torch.bfloat16, device)
    tuning = importlib.import_module(f"{ops.__name__}.triton.tuning")
    with tuning.trying("prefill_attention", {"ONE_LOOP": one_loop}):
        assert_matches_reference(ops, "prefill_attention", *inputs)


@pytest.mark.parametrize("page_size", [32, 48, 80])
def test_tiles_divide_the_page(ops, device, page_size):
    inputs = _inputs([(40, 100), (1, page_size)], (4, 2, 32), torch.bfloat16, device, page_size)
    assert_matches_reference(ops, "prefill_attention", *inputs)


@pytest.mark.parametrize(("page_size", "dtype"), [(16, torch.bfloat16), (64, torch.float32)])
def test_tiles_tuned_for_other_sizes(ops, device, page_size, dtype):
    """A tile of keys lies within one page or is two, whatever a tuned file says of larger pages."""
    inputs = _inputs([(40, 100)], (4, 2, 32), dtype, device, page_size)
    tuning = importlib.import_module(f"{ops.__name__}.triton.tuning")
    with tuning.trying("prefill_attention", {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8}) as trial:
        assert_matches_reference(ops, "prefill_attention", *inputs)
    assert bool(trial.seen) == (dtype != torch.float32)  # float32 has no tuned tiles


def test_numbers_of_pages_beyond_the_sequence(ops, device):
    """Nobody looks at them."""
    q, pages, tables, *rest = _inputs([(40, 100), (7, 7)], (4, 2, 32), torch.bfloat16, device)
    garbage = torch.where(tables == 0, torch.tensor([2**31 - 1, -5], dtype=torch.int32, device=device)[:, None], tables)
    assert not torch.equal(garbage, tables)
    out = ops.prefill_attention(q, pages, garbage, *rest)
    assert torch.equal(out, ops.prefill_attention(q, pages, tables, *rest))


def test_wide_integers(ops, device):
    q, pages, *integers, scale = _inputs([(40, 100), (7, 7)], (4, 2, 32), torch.bfloat16, device)
    wide = [each.long() for each in integers]
    out = ops.prefill_attention(q, pages, *wide, scale)
    assert torch.equal(out, ops.prefill_attention(q, pages, *integers, scale))


def test_bits_are_batch_invariant(ops, device, monkeypatch):
    round_products_once(monkeypatch)
    parts = [(130, 150), (1, 64), (20, 20)]
    q, pages, tables, lengths, starts, scale = _inputs(parts, (4, 2, 32), torch.bfloat16, device)
    together = ops.prefill_attention(q, pages, tables, lengths, starts, scale)
    for row, (count, _) in enumerate(parts):
        rows, own = slice(starts[row], starts[row] + count), slice(row, row + 1)
        start = torch.tensor([0, count], dtype=torch.int32, device=device)
        alone = ops.prefill_attention(q[rows], pages, tables[own], lengths[own], start, scale)
        assert torch.equal(alone, together[rows])


@pytest.mark.parametrize("computed", [1, 63, 100])
def test_bits_do_not_depend_on_chunks(ops, device, computed, monkeypatch):
    round_products_once(monkeypatch)
    q, pages, tables, lengths, starts, scale = _inputs([(200, 200)], (4, 2, 32), torch.bfloat16, device)
    whole = ops.prefill_attention(q, pages, tables, lengths, starts, scale)
    rest = ops.prefill_attention(q[computed:], pages, tables, lengths, (starts - computed).clamp(min=0), scale)
    assert torch.equal(rest, whole[computed:])


def test_one_query_is_a_decode_step(ops, device):
    q, pages, tables, lengths, starts, scale = _inputs([(1, 65), (1, 9)], (4, 2, 64), torch.float32, device)
    out = assert_matches_reference(ops, "prefill_attention", q, pages, tables, lengths, starts, scale)
    torch.testing.assert_close(out, ops.decode_attention(q, pages, tables, lengths, scale))


@pytest.mark.parametrize("size", [300.0, 1e-3])
def test_scores_of_any_size(ops, device, size):
    q, *rest = _inputs([(70, 100)], (2, 1, 64), torch.float32, device)
    assert_matches_reference(ops, "prefill_attention", q * size, *rest)


@pytest.mark.parametrize("scale", [0.0, -0.3, 5e-39])
def test_any_scale(ops, device, scale):
    *inputs, _ = _inputs([(70, 100)], (2, 1, 64), torch.float32, device)
    assert_matches_reference(ops, "prefill_attention", *inputs, scale)


def test_strided_queries(ops, device):
    q, *rest = _inputs([(20, 30), (7, 7)], (4, 2, 32), torch.bfloat16, device)
    qkv = torch.cat((q.flatten(1), torch.full((27, 128), float("nan"), dtype=q.dtype, device=device)), dim=1)
    view = qkv.unflatten(1, (-1, 32))[:, :4]
    assert torch.equal(ops.prefill_attention(view, *rest), ops.prefill_attention(q, *rest))
    apart = torch.cat((q, torch.full_like(q, float("nan"))), dim=2)[:, :, :32]  # heads that do not follow each other
    assert torch.equal(ops.prefill_attention(apart, *rest), ops.prefill_attention(q, *rest))


@pytest.mark.parametrize(("head_dim", "page_size"), [(80, 64), (32, 24)])
@pytest.mark.filterwarnings("ignore:qwenkern")  # on a GPU: torch runs it, slower
def test_sizes_for_the_reference(ops, device, head_dim, page_size):
    inputs = _inputs([(20, 30), (7, 7)], (4, 2, head_dim), torch.float16, device, page_size)  # C does not take it
    assert torch.equal(ops.prefill_attention(*inputs), reference.prefill_attention(*inputs))


@pytest.mark.parametrize("page_size", [64, 32])
def test_pages_beyond_two_to_the_31(ops, device, page_size):
    """Only the pages touched take memory. What a number of 32 bits would wrap to lies in the first half."""
    q, pages, tables, *rest = _inputs([(10, 200)], (2, 1, 128), torch.bfloat16, device, page_size)
    far = 2**31 // (page_size * 128) + 7
    far_pages = torch.empty(2, far + len(pages.k), page_size, 1, 128, dtype=q.dtype, device=device)[1]
    far_pages[far:] = pages.k
    out = ops.prefill_attention(q, (far_pages, far_pages), tables + far, *rest)
    assert torch.equal(out, ops.prefill_attention(q, (pages.k, pages.k), tables, *rest))


@pytest.mark.gpu
def test_races(ops):
    device = torch.device("cuda")
    inputs = _inputs([(300, 300), (1, 200), (1000, 3000)], (16, 2, 128), torch.bfloat16, device)
    first = assert_matches_reference(ops, "prefill_attention", *inputs)
    for _ in range(250):
        assert torch.equal(ops.prefill_attention(*inputs), first)


@pytest.mark.parametrize(
    ("at", "change", "message"),
    [
        (4, lambda starts: starts[:-1], r"query_starts must have shape \[3\], and has \[2\]"),
        (4, lambda starts: starts.float(), "query_starts must be int32 or int64, and is float32"),
        (4, lambda starts: starts + 1, r"rise from 0 to q's 25 rows, .* and is \[1, 21, 26\] for lengths \[20, 9\]"),
        (4, lambda starts: starts.flip(0), "query_starts must rise from 0 to q's 25 rows"),
        (3, lambda lengths: lengths - 1, "by no more than each sequence's length"),
        (3, lambda lengths: lengths + 200, "lengths must be within 1 and 128, and one is 2"),
        (2, lambda tables: tables + 9, "block_tables must be within 0 and 2, and one is 1"),
        (0, lambda q: q[:, :3], "q's 3 heads must be a multiple of the cache's 2"),
        (0, lambda q: q[:0], r"q is empty, with shape \[0, 4, 32\]"),
        (0, lambda q: q.double(), "k_pages must be float64, and is float32"),
    ],
)
def test_bad_input(ops, at, change, message):
    inputs = list(_inputs([(20, 20), (5, 9)], (4, 2, 32), torch.float32, torch.device("cpu")))
    inputs[at] = change(inputs[at])
    with pytest.raises((TypeError, ValueError), match=message):
        ops.prefill_attention(*inputs)


def test_registration(ops, device):
    q, pages, *rest = _inputs([(5, 9), (2, 2)], (2, 1, 16), torch.float32, device, page_size=16)
    torch.library.opcheck(torch.ops.qwenkern.prefill_attention, (q, list(pages.tensors), *rest))


def _inputs(parts, heads, dtype, device, page_size=64):
    """``parts``: queries and cached tokens of each sequence."""
    num_q_heads, num_kv_heads, head_dim = heads
    counts = torch.tensor([0, *(count for count, _ in parts)])
    q = random(int(counts.sum()), num_q_heads, head_dim, dtype=dtype, device=device, seed=14)
    cache = paged_cache([length for _, length in parts], num_kv_heads, head_dim, page_size, dtype, device)
    return q, *cache, counts.cumsum(0).to(device, torch.int32), head_dim**-0.5


_PREFIX = {"page_size": 64, "prefix": 63, "dtype": torch.float32}
_TWO = {"page_size": 16, "prefix": 15, "dtype": torch.bfloat16}  # a tile of two pages
_3B = {"heads": (16, 2, 128)}
FILE = "triton/prefill_attention.py"
MUTATIONS = [
    Mutation(
        "heads of another group",
        FILE,
        "k = LOAD_K(pages, kv_head,",
        "k = LOAD_K(pages, tl.program_id(0) % 2,",
        test_heads_of_the_family,
        _3B,
    ),
    Mutation("no causal mask", FILE, "<= positions[:, None], scores", "< 999, scores", test_cached_prefixes, _PREFIX),
    Mutation(
        "itself not seen",
        FILE,
        "<= positions[:, None]",
        "< tl.maximum(positions, 1)[:, None]",
        test_cached_prefixes,
        _PREFIX,
    ),
    Mutation(
        "prefix forgotten",
        FILE,
        "- query_end + length\n    column",
        "- query_start\n    column",
        test_cached_prefixes,
        _PREFIX,
    ),
    Mutation(
        "diagonal one tile late",
        FILE,
        "+ length + 1) // BLOCK_N",
        "+ length + BLOCK_N) // BLOCK_N",
        test_cached_prefixes,
        _PREFIX | {"prefix": 1},
    ),
    Mutation("result not rescaled", FILE, "acc * shrink[:, None])", "acc)", test_cached_prefixes, _PREFIX),
    Mutation("sum not rescaled", FILE, "total * shrink", "total", test_cached_prefixes, _PREFIX),
    Mutation("the sequence before", FILE, "+ middle <= tile", "+ middle < tile", test_many_short_sequences, {}),
    Mutation(
        "queries of the next sequence",
        FILE,
        "mask=(rows < query_end)[:, None]",
        "mask=(rows <= query_end)[:, None]",
        test_ragged_batch,
        {},
    ),
    Mutation(
        "v beyond the last token",
        FILE,
        "v = LOAD_V(pages, kv_head, this_page, token, column, mask)",
        "v = LOAD_V(pages, kv_head, this_page, token, column, None)",
        test_cached_prefixes,
        _PREFIX,
    ),
    Mutation("the page before", FILE, "table, tile + BLOCK_N,", "table, tile,", test_cached_prefixes, _PREFIX),
    Mutation("one page twice", FILE, "row < SIZE, page, second", "row < SIZE, page, page", test_cached_prefixes, _TWO),
    Mutation(
        "32-bit offsets",
        FILE,
        "tile // PAGE_SIZE, last)).to(tl.int64)",
        "tile // PAGE_SIZE, last)).to(tl.int32)",
        test_pages_beyond_two_to_the_31,
        {"page_size": 64},
    ),
    Mutation("largest of negative scores", FILE, "if scale < 0:", "if False:", test_any_scale, {"scale": -0.3}),
    Mutation("masked scores times 0", FILE, "max(scale, 1e-30)", "scale", test_any_scale, {"scale": 0.0}),
    Mutation(
        "a tile too few",
        FILE,
        '["BLOCK_M"] + len(lengths)',
        '["BLOCK_M"] + len(lengths) - 1',
        test_many_short_sequences,
        {},
    ),
    Mutation(
        "tile of several pages",
        FILE,
        "min(block_n, 2 * power if power == page_size else power)",
        "block_n",
        test_tiles_tuned_for_other_sizes,
        {"page_size": 16, "dtype": torch.bfloat16},
    ),
]
