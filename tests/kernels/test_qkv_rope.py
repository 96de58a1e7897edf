"""norm_qkv_rope against its reference, and against the two ops that it combines."""

from __future__ import annotations

import pytest
import torch
from support.mutations import Mutation
from support.references import assert_matches_reference, exact, random

EPS = 1e-6
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
HEADS = {"0.5B": (14, 2, 64), "3B": (16, 2, 128), "7B": (28, 4, 128), "one head": (1, 1, 16), "odd": (5, 3, 32)}
CHANGED = (7,)


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("tokens", [1, 7])
def test_heads(ops, device, tokens, heads):
    assert_matches_reference(
        ops, "norm_qkv_rope", *_inputs(tokens, 128, *heads, torch.bfloat16, device), changed=CHANGED
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [HEADS["odd"], HEADS["one head"]], ids=["odd", "one head"])
@pytest.mark.parametrize("tokens", [1, 7])
def test_norm_qkv_rope(ops, device, tokens, heads, dtype):
    assert_matches_reference(ops, "norm_qkv_rope", *_inputs(tokens, 128, *heads, dtype, device), changed=CHANGED)


@pytest.mark.parametrize("tokens", [2, 8, 16, 17])
@pytest.mark.parametrize("hidden", [896, 1000, 2048])
def test_sizes(ops, device, tokens, hidden):
    assert_matches_reference(
        ops, "norm_qkv_rope", *_inputs(tokens, hidden, 4, 2, 64, torch.bfloat16, device), changed=CHANGED
    )


@pytest.mark.processor
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_equal_to_its_two_halves(ops, device, dtype, bias):
    """Rounded where they round; a GPU's compiler may fuse a product and a sum in one of them only.

    Their tiles differ, and so would what a matrix library makes of them: all sums are exact here. An x of plus and
    minus 1/2 has a root-mean-square of 1/2, and normalised it is plus and minus 1."""
    *_, positions, cos_sin, pages, slots = _inputs(5, 896, 2, 1, 64, dtype, device)
    x = torch.where(exact(5, 896, dtype=dtype, device=device, seed=2) < 0, -0.5, 0.5).to(dtype)
    norm = 1 + exact(896, dtype=dtype, device=device, seed=3, steps=32)
    weight = exact(4 * 64, 896, dtype=dtype, device=device, seed=4, steps=7)
    b = exact(4 * 64, dtype=dtype, device=device, seed=5) if bias else None
    eps, peers = 0.0, [each.clone() for each in pages]
    q = ops.norm_qkv_rope(x, norm, eps, weight, b, positions, cos_sin, pages, slots)
    qkv = ops.norm_linear(x, norm, eps, weight, b)
    q_too = ops.rope_and_cache(qkv, positions, cos_sin, peers, slots)
    assert torch.equal(pages[1].nan_to_num(), peers[1].nan_to_num())  # v is not rotated
    if device.type == "cpu":
        assert torch.equal(q, q_too)
        assert torch.equal(pages[0].nan_to_num(), peers[0].nan_to_num())


def test_slots_that_are_not_named_keep_their_content(ops, device):
    *inputs, pages, slots = _inputs(3, 96, 4, 2, 32, torch.float32, device)
    before = [each.clone() for each in pages]
    ops.norm_qkv_rope(*inputs, pages, slots)
    for each, old in zip(pages, before, strict=True):
        assert not torch.equal(each, old)
        each.view(-1, 64)[slots] = old.view(-1, 64)[slots]
        assert torch.equal(each, old)


def test_v_is_not_rotated(ops, device):
    """An infinite element of v must not reach its partner."""
    inputs = _inputs(2, 64, 2, 1, 64, torch.float32, device)
    inputs[4][-1] = float("inf")
    ops.norm_qkv_rope(*inputs)
    written = inputs[7][1].view(-1, 64)[inputs[8]]
    assert written[:, -1].isinf().all()
    assert written[:, :-1].isfinite().all()


@pytest.mark.gpu
def test_bits_are_batch_invariant(ops):
    device = torch.device("cuda")
    x, norm, eps, weight, bias, positions, cos_sin, pages, slots = _inputs(16, 2048, 16, 2, 128, torch.bfloat16, device)
    together = ops.norm_qkv_rope(x, norm, eps, weight, bias, positions, cos_sin, pages, slots)
    expected = [each.view(-1, 256)[slots].clone() for each in pages]
    for repeat in range(250):
        n = 1 + repeat % 16
        q = ops.norm_qkv_rope(x[:n], norm, eps, weight, bias, positions[:n], cos_sin, pages, slots[:n])
        assert torch.equal(q, together[:n])
        for each, wanted in zip(pages, expected, strict=True):
            assert torch.equal(each.view(-1, 256)[slots], wanted)


@pytest.mark.parametrize(
    ("at", "shape", "message"),
    [
        (3, (100, 96), "norm_qkv_rope: weight's rows of 100 must hold more than 4 heads of 32"),
        (3, (128, 96), "norm_qkv_rope: weight's rows of 128 must hold more than 4 heads of 32"),
        (4, (7,), r"norm_qkv_rope: bias must have shape \[256\], and has \[7\]"),
        (5, (2,), r"norm_qkv_rope: positions must have shape \[3\], and has \[2\]"),
        (8, (4,), r"norm_qkv_rope: slots must have shape \[3\], and has \[4\]"),
    ],
)
def test_bad_shapes(ops, device, at, shape, message):
    inputs = _inputs(3, 96, 4, 2, 32, torch.float32, device)
    inputs[at] = torch.ones(shape, dtype=inputs[at].dtype, device=device)
    if at == 3:
        inputs[4] = None
    with pytest.raises(ValueError, match=message):
        ops.norm_qkv_rope(*inputs)


def test_registration(ops, device):
    inputs = _inputs(2, 64, 2, 1, 16, torch.float32, device)
    inputs[3], inputs[7] = [inputs[3]], [torch.zeros_like(each) for each in inputs[7]]
    torch.library.opcheck(torch.ops.qwenkern.norm_qkv_rope, tuple(inputs))


def _inputs(tokens, hidden, num_q_heads, num_kv_heads, head_dim, dtype, device):
    size = (num_q_heads + 2 * num_kv_heads) * head_dim
    x = random(tokens, hidden, dtype=dtype, device=device, seed=1)
    norm = (1 + random(hidden, dtype=torch.float32, device=device, seed=3, scale=0.3)).to(dtype)
    weight = random(size, hidden, dtype=dtype, device=device, seed=4, scale=hidden**-0.5)
    bias = random(size, dtype=dtype, device=device, seed=5)
    angles = torch.rand(40, head_dim // 2, generator=torch.Generator().manual_seed(6)) * 6
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1).to(device)
    positions = (torch.arange(tokens, device=device) * 7 + 3) % 40
    pages = [random(4, 16, num_kv_heads, head_dim, dtype=dtype, device=device, seed=seed) for seed in (7, 8)]
    slots = (torch.arange(tokens, device=device) * 5 + 2) % 64
    return [x, norm, EPS, weight, bias, positions, cos_sin, pages, slots]


_FEW = {"tokens": 7, "heads": HEADS["odd"], "dtype": torch.float32}
MUTATIONS = [
    Mutation(
        "rows of one half only",
        "triton/qkv_rope.py",
        "places // half * (head_dim // 2)",
        "places // half * half",
        test_norm_qkv_rope,
        _FEW,
    ),
    Mutation(
        "sine's sign",
        "triton/qkv_rope.py",
        "low * cos - high * sin",
        "low * cos + high * sin",
        test_norm_qkv_rope,
        _FEW,
    ),
    Mutation(
        "position of the first token",
        "triton/qkv_rope.py",
        "rope.positions + token)",
        "rope.positions + token * 0)",
        test_norm_qkv_rope,
        _FEW,
    ),
    Mutation(
        "v rotated",
        "triton/qkv_rope.py",
        "is_v = head >= rope.num_q_heads + rope.num_kv_heads",
        "is_v = head < 0",
        test_v_is_not_rotated,
        {},
    ),
    Mutation(
        "k into v's head",
        "triton/qkv_rope.py",
        "v_head = k_head - heads",
        "v_head = 0",
        test_norm_qkv_rope,
        _FEW,
    ),
    Mutation(
        "not rounded before it turns",
        "triton/qkv_rope.py",
        "tl.reshape(round_to(products, dtype)",
        "tl.reshape((products)",
        test_equal_to_its_two_halves,
        {"dtype": torch.bfloat16, "bias": True},
    ),
    Mutation(
        "tokens beyond the batch",
        "triton/qkv_rope.py",
        "tl.broadcast_to(tokens[None, :] < num_tokens",
        "tl.broadcast_to(tokens[None, :] < BLOCK_T",
        test_norm_qkv_rope,
        _FEW,
    ),
    Mutation(
        "bias forgotten",
        "triton/qkv_rope.py",
        "        products += bias[:, None]",
        "        pass",
        test_norm_qkv_rope,
        _FEW,
    ),
]
