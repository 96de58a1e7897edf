"""apply_rope and rope_and_cache against their references."""

from __future__ import annotations

import pytest
import torch
from support.mutations import Mutation
from support.references import (
    assert_matches_reference,
    assert_rounds_like_reference,
    guard,
    guarded_allocations,
    mapped,
    random,
)
from support.tolerances import assert_as_close_as

from qwenkern.kernels import reference

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
HEADS = {"0.5B": (14, 2, 64), "1.5B": (12, 2, 128), "3B": (16, 2, 128), "7B": (28, 4, 128), "72B": (64, 8, 128)}
HEADS |= {"one head": (1, 1, 16), "odd": (5, 3, 32)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("tokens", [1, 7])
def test_rope_and_cache(ops, device, tokens, heads, dtype):
    assert_matches_reference(ops, "rope_and_cache", *_inputs(tokens, *heads, dtype, device), changed=(3,))


@pytest.mark.parametrize("tokens", [128, 300])
def test_many_tokens(ops, device, tokens):
    inputs = _inputs(tokens, 4, 2, 16, torch.bfloat16, device)
    assert_matches_reference(ops, "rope_and_cache", *inputs, changed=(3,))


@pytest.mark.parametrize("padding", [8, 3])
def test_strided_rows(ops, device, padding):
    """Only qkv may have a stride, so only its layout has one."""
    qkv, *rest = _inputs(5, 14, 2, 64, torch.bfloat16, device)
    peers = [mapped(torch.Tensor.clone, each) for each in rest]
    with guarded_allocations():
        q = ops.rope_and_cache(guard(qkv, padding), *rest)
    assert torch.equal(q, ops.rope_and_cache(qkv, *peers))
    assert all(torch.equal(*pair) for pair in zip(rest[2], peers[2], strict=True))


def test_v_is_copied_bit_for_bit(ops, device):
    qkv, *rest = _inputs(2, 2, 1, 64, torch.bfloat16, device)
    qkv[0, -1], qkv[0, -2], qkv[1, -3] = float("inf"), float("nan"), -0.0
    ops.rope_and_cache(qkv, *rest)
    _, _, pages, slots = rest
    written = pages[1].view(-1, 64)[slots].view(torch.int16)
    assert torch.equal(written, qkv[:, -64:].contiguous().view(torch.int16))


def test_slots_that_are_not_named_keep_their_content(ops, device):
    qkv, positions, cos_sin, pages, slots = _inputs(3, 4, 2, 32, torch.float32, device)
    before = [each.clone() for each in pages]
    ops.rope_and_cache(qkv, positions, cos_sin, pages, slots)
    for each, old in zip(pages, before, strict=True):
        each.view(-1, 64)[slots] = old.view(-1, 64)[slots]
        assert torch.equal(each, old)


def test_slots_beyond_two_to_the_31(ops, device):
    """Only the pages touched take memory. The cache is the latter half of a buffer, as a layer's can be: an offset cut
    to 32 bits would be negative and lead to the former half."""
    qkv, positions, cos_sin, *_ = _inputs(2, 2, 1, 128, torch.bfloat16, device)
    num_pages = 2**31 // (64 * 128) + 1
    k_pages, v_pages = (torch.empty(2, num_pages, 64, 1, 128, dtype=qkv.dtype, device=device)[1] for _ in range(2))
    slots = torch.tensor([2**31 // 128 + 5, num_pages * 64 - 1], device=device)
    ops.rope_and_cache(qkv, positions, cos_sin, (k_pages, v_pages), slots)
    small = [torch.empty(1, 2, 1, 128, dtype=qkv.dtype, device=device) for _ in range(2)]
    ops.rope_and_cache(qkv, positions, cos_sin, small, torch.arange(2, device=device))
    assert torch.equal(k_pages.view(-1, 128)[slots], small[0].view(-1, 128))
    assert torch.equal(v_pages.view(-1, 128)[slots], small[1].view(-1, 128))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
def test_apply_rope(ops, device, heads, dtype):
    num_q_heads, num_kv_heads, head_dim = heads
    _, positions, cos_sin, *_ = _inputs(5, *heads, dtype, device)
    q = random(5, num_q_heads, head_dim, dtype=dtype, device=device, seed=7)
    k = random(5, num_kv_heads, head_dim, dtype=dtype, device=device, seed=8)
    assert_matches_reference(ops, "apply_rope", q, k, cos_sin, positions)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [HEADS["3B"], HEADS["odd"]], ids=["3B", "odd"])
@pytest.mark.parametrize("tokens", [1, 130])
def test_inverse(ops, device, tokens, heads, dtype):
    """A rotation by the negative angle: against the reference, and as the inverse of a rotation."""
    num_q_heads, num_kv_heads, head_dim = heads
    _, positions, cos_sin, *_ = _inputs(tokens, *heads, dtype, device)
    q = random(tokens, num_q_heads, head_dim, dtype=dtype, device=device, seed=7)
    k = random(tokens, num_kv_heads, head_dim, dtype=dtype, device=device, seed=8)
    assert_matches_reference(ops, "apply_rope", q, k, cos_sin, positions, inverse=True)
    rotated = ops.apply_rope(q, k, cos_sin, positions)
    turned_back = reference.apply_rope(*(each.double() for each in rotated), cos_sin.double(), positions, inverse=True)
    for out, peer, truth in zip(
        ops.apply_rope(*rotated, cos_sin, positions, inverse=True), (q, k), turned_back, strict=True
    ):
        assert_as_close_as(out, peer, truth)


@pytest.mark.parametrize("of_qkv", [True, False])
def test_apply_rope_to_views(ops, device, of_qkv):
    """Of the packed projection, or as transformers has them: [heads, tokens, D], transposed."""
    qkv, positions, cos_sin, *_ = _inputs(5, 4, 2, 64, torch.bfloat16, device)
    q, k, _ = qkv.view(5, 8, 64).split((4, 2, 2), dim=1)
    if not of_qkv:
        q, k = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k))
    assert not q.is_contiguous()
    outs = ops.apply_rope(q, k, cos_sin, positions)
    for out, expected in zip(outs, ops.apply_rope(q.contiguous(), k.contiguous(), cos_sin, positions), strict=True):
        assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_roundings(ops, device, dtype):
    """Once, after the sum."""
    _, positions, cos_sin, *_ = _inputs(5, 16, 2, 128, dtype, device)
    q, k = (random(5, heads, 128, dtype=dtype, device=device) for heads in (16, 2))
    assert_rounds_like_reference(ops, "apply_rope", q, k, cos_sin, positions)


def test_indices_of_32_bits(ops, device):
    qkv, positions, cos_sin, pages, slots = _inputs(3, 4, 2, 32, torch.bfloat16, device)
    inputs = qkv, positions.int(), cos_sin, pages, slots.int()
    assert_matches_reference(ops, "rope_and_cache", *inputs, changed=(3,))


def test_other_head_sizes_run_on_the_reference(ops, device):
    inputs = _inputs(3, 4, 2, 80, torch.float32, device)
    copies = [mapped(torch.Tensor.clone, each) for each in inputs]
    assert torch.equal(ops.rope_and_cache(*inputs), reference.rope_and_cache(*copies))
    assert torch.equal(inputs[3][0], copies[3][0])


@pytest.mark.parametrize(
    ("at", "change", "message"),
    [
        (0, lambda qkv: qkv[:, :-1], "rope_and_cache: qkv's rows of 127 must hold more than 2 heads of 32"),
        (0, lambda qkv: qkv[:, :64], "rope_and_cache: qkv's rows of 64 must hold more than 2 heads of 32"),
        (0, lambda qkv: qkv.half(), "k_pages must be float16, and is float32"),
        (1, lambda positions: positions[:1], r"positions must have shape \[2\], and has \[1\]"),
        (1, lambda positions: positions.float(), "positions must be int32 or int64, and is float32"),
        (1, lambda positions: positions + 1000, "positions must be within 0 and 99, and one is"),
        (2, lambda cos_sin: cos_sin.double(), "cos_sin must be float32, and is float64"),
        (2, lambda cos_sin: cos_sin[:, :-2], r"cos_sin must have shape \[context, 32\], and has \[100, 30\]"),
        (3, lambda pages: (pages[0][:, ::2], pages[1]), "k_pages must be contiguous, and has strides"),
        (3, lambda pages: (pages[0], pages[1][:1]), "v_pages must have shape"),
        (4, lambda slots: slots - 1000, "slots must be within 0 and"),
    ],
)
def test_bad_input(ops, at, change, message):
    inputs = list(_inputs(2, 2, 1, 32, torch.float32, torch.device("cpu")))
    inputs[at] = change(inputs[at])
    with pytest.raises((TypeError, ValueError), match=message):
        ops.rope_and_cache(*inputs)


@pytest.mark.parametrize(
    ("at", "change", "message"),
    [
        (0, lambda q: q[0], r"apply_rope: q must have shape \[T, Hq, D\], and has \[4, 32\]"),
        (0, lambda q: q.bfloat16(), "k must be bfloat16, and is float32"),
        (1, lambda k: k[:1], r"k must have shape \[2, Hkv, 32\], and has \[1, 2, 32\]"),
        (1, lambda k: k[..., ::2], r"k must have shape \[2, Hkv, 32\], and has \[2, 2, 16\]"),
        (2, lambda cos_sin: cos_sin.half(), "cos_sin must be float32, and is float16"),
        (3, lambda positions: -1 - positions, "positions must be within 0 and 99, and one is -"),
    ],
)
def test_bad_input_to_apply_rope(ops, at, change, message):
    _, positions, cos_sin, *_ = _inputs(2, 4, 2, 32, torch.float32, torch.device("cpu"))
    inputs = [torch.ones(2, 4, 32), torch.ones(2, 2, 32), cos_sin, positions]
    inputs[at] = change(inputs[at])
    with pytest.raises((TypeError, ValueError), match=message):
        ops.apply_rope(*inputs)


def test_registrations(ops, device):
    inputs = _inputs(2, 4, 2, 16, torch.float32, device)
    torch.library.opcheck(torch.ops.qwenkern.rope_and_cache, inputs)
    q, k = inputs[0].view(2, 8, 16).split((6, 2), dim=1)
    torch.library.opcheck(torch.ops.qwenkern.apply_rope, (q, k, inputs[2], inputs[1]))
    torch.library.opcheck(torch.ops.qwenkern.apply_rope, (q, k, inputs[2], inputs[1]), {"inverse": True})


def _inputs(tokens, num_q_heads, num_kv_heads, head_dim, dtype, device):
    """qkv, positions, cos_sin, (k_pages, v_pages), slots: in no order, over pages that hold something already."""
    qkv = random(tokens, (num_q_heads + 2 * num_kv_heads) * head_dim, dtype=dtype, device=device)
    angles = torch.arange(100)[:, None] / 10000 ** (torch.arange(0, head_dim, 2) / head_dim)
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1).to(device)
    generator = torch.Generator().manual_seed(1)
    positions = torch.randint(100, (tokens,), generator=generator).to(device)
    page_size = 16
    num_pages = tokens // page_size + 3
    slots = torch.randperm(num_pages * page_size, generator=generator)[:tokens].to(device)
    shape = (num_pages, page_size, num_kv_heads, head_dim)
    pages = [random(*shape, dtype=dtype, device=device, seed=seed) for seed in (2, 3)]
    return qkv, positions, cos_sin, pages, slots


_SMALL = {"tokens": 7, "heads": (5, 3, 32), "dtype": torch.float32}
MUTATIONS = [
    Mutation(
        "sign of the sine",
        "triton/rope.py",
        "first * cos - second * sin",
        "first * cos + second * sin",
        test_rope_and_cache,
        _SMALL,
    ),
    Mutation(
        "never inverse",
        "triton/rope.py",
        "        sin = -sin\n",
        "        sin = sin\n",
        test_inverse,
        {"tokens": 1, "heads": (5, 3, 32), "dtype": torch.float32},
    ),
    Mutation(
        "sine and cosine exchanged",
        "triton/rope.py",
        "position * HEAD_DIM + HALF + column",
        "position * HEAD_DIM + column",
        test_rope_and_cache,
        _SMALL,
    ),
    Mutation(
        "products rounded",
        "triton/rope.py",
        "cast(first * cos - second * sin, dtype)",
        "cast(cast(first * cos, dtype).to(tl.float32) - cast(second * sin, dtype).to(tl.float32), dtype)",
        test_roundings,
        {"dtype": torch.bfloat16},
    ),
    Mutation(
        "k where q is",
        "triton/rope.py",
        "tl.where(is_q, tl.load(q_from, mask=is_q)",
        "tl.where(is_k, tl.load(q_from, mask=is_q)",
        test_rope_and_cache,
        _SMALL,
    ),
    Mutation(
        "position of the row", "triton/rope.py", "tl.load(positions_ptr + token)", "token", test_rope_and_cache, _SMALL
    ),
    Mutation(
        "slot of the row",
        "triton/rope.py",
        "slot = tl.load(slots_ptr + token).to(tl.int64)",
        "slot = token",
        test_rope_and_cache,
        _SMALL,
    ),
    Mutation(
        "slot in 32 bits",
        "triton/rope.py",
        "tl.load(slots_ptr + token).to(tl.int64)",
        "tl.load(slots_ptr + token).to(tl.int32)",
        test_slots_beyond_two_to_the_31,
        {},
    ),
    Mutation(
        "heads of v counted from q",
        "triton/rope.py",
        "token * k_stride + v_heads",
        "token * k_stride + k_heads",
        test_rope_and_cache,
        _SMALL,
    ),
    Mutation(
        "heads beyond the last",
        "triton/rope.py",
        "is_v = (v_heads >= 0) & (v_heads < num_kv_heads)",
        "is_v = v_heads >= 0",
        test_rope_and_cache,
        _SMALL,
    ),
]
