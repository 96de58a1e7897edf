"""attention over tensors in transformers' layout, against its reference and against the paged ops."""

from __future__ import annotations

import pytest
import torch
from support.mutations import Mutation
from support.references import assert_matches_reference, random, tensors_left_behind

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("heads", [(14, 2, 64), (16, 2, 128), (3, 3, 32)], ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 65), (1, 130), (5, 5), (65, 130), (130, 130), (3, 200)])
def test_heads_of_the_family(ops, device, heads, queries, keys):
    assert_matches_reference(ops, "attention", *_inputs(2, queries, keys, heads, torch.bfloat16, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 20])
def test_dtypes(ops, device, queries, dtype):
    assert_matches_reference(ops, "attention", *_inputs(3, queries, 70, (4, 2, 64), dtype, device))


@pytest.mark.parametrize("queries", [1, 20])
def test_any_strides(ops, device, queries):
    """Token by token, as a projection leaves them; in a cache with room for more; keys and values laid out apart."""
    q, k, v, scale = _inputs(2, queries, 70, (4, 2, 64), torch.bfloat16, device)
    expected = ops.attention(q, k, v, scale)
    by_token = [each.transpose(1, 2).contiguous().transpose(1, 2) for each in (q, k, v)]
    assert torch.equal(ops.attention(*by_token, scale), expected)
    room = torch.full((2, 2, 128, 64), float("nan"), dtype=k.dtype, device=device)
    room[:, :, :70] = k
    assert torch.equal(ops.attention(q, room[:, :, :70], by_token[2], scale), expected)
    assert torch.equal(ops.attention(q[1:], k[1:], v[1:], scale), expected[1:])


@pytest.mark.parametrize("queries", [1, 20])
def test_no_tensor_is_kept(ops, device, queries):
    inputs = _inputs(2, queries, 70, (4, 2, 16), torch.bfloat16, device)
    assert tensors_left_behind(lambda: ops.attention(*inputs)) == []


@pytest.mark.parametrize(
    ("at", "change", "message"),
    [
        (0, lambda q: q[0], r"attention: q must have shape \[B, Hq, Tq, D\]"),
        (0, lambda q: q[:, :3], "attention: q's 3 heads must be a multiple of k's 2"),
        (1, lambda k: k[:1], r"attention: k must have shape \[2, Hkv, Tk, 64\]"),
        (1, lambda k: k.half(), "attention: k must be float32, and is float16"),
        (2, lambda v: v[:, :, :9], r"attention: v must have shape \[2, 2, 10, 64\]"),
        (0, lambda q: q.repeat(1, 1, 3, 1), "attention: k has 10 tokens, fewer than q's 15"),
    ],
)
def test_bad_input(ops, at, change, message):
    inputs = list(_inputs(2, 5, 10, (4, 2, 64), torch.float32, torch.device("cpu")))
    inputs[at] = change(inputs[at])
    with pytest.raises((TypeError, ValueError), match=message):
        ops.attention(*inputs)


def test_other_sizes_run_on_the_reference(ops, device):
    assert torch.isfinite(ops.attention(*_inputs(1, 2, 9, (2, 1, 80), torch.float32, device))).all()


def test_registration(ops, device):
    torch.library.opcheck(torch.ops.qwenkern.attention, _inputs(2, 1, 9, (2, 1, 16), torch.float32, device))
    torch.library.opcheck(torch.ops.qwenkern.attention, _inputs(2, 3, 9, (2, 1, 16), torch.float32, device))


def test_it_has_no_gradient(ops, device):
    q, k, v, scale = _inputs(1, 3, 9, (2, 1, 16), torch.float32, device)
    with pytest.raises(RuntimeError, match="autograd"):
        ops.attention(q.requires_grad_(), k, v, scale).sum().backward()


def _inputs(batch, queries, keys, heads, dtype, device):
    """Of (query heads, key-value heads, head size)."""
    num_heads, num_kv_heads, dim = heads
    q = random(batch, num_heads, queries, dim, dtype=dtype, device=device, seed=1, scale=2.0)
    k, v = (random(batch, num_kv_heads, keys, dim, dtype=dtype, device=device, seed=seed) for seed in (2, 3))
    return q, k, v, dim**-0.5


_MANY = {"heads": (14, 2, 64), "queries": 65, "keys": 130}
MUTATIONS = [
    Mutation(
        "keys' strides for values", "pages/dense.py", "at = token * token_stride + column",
        "at = token * pages.k_token_stride + column", test_any_strides, {"queries": 1},
    ),
    Mutation(
        "keys' strides for values of a prompt", "pages/dense.py", "at = token * token_stride + column",
        "at = token * pages.k_token_stride + column", test_any_strides, {"queries": 20},
    ),
    Mutation(
        "one sequence's page for all", "triton/attention.py",
        "counts[:batch, None]", "counts[:1, None].expand(batch, 1)", test_heads_of_the_family, _MANY,
    ),
]  # fmt: skip
