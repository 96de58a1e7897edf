"""lm_head and its fused top k against their references."""

from __future__ import annotations

import pytest
import torch
from support.mutations import Mutation
from support.references import assert_matches_reference, exact, guarded_allocations, random

from qwenkern.kernels import reference

EPS = 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 16, 17])
def test_lm_head(ops, device, tokens, dtype):
    assert_matches_reference(ops, "lm_head", *_inputs(tokens, 403, 896, dtype, device))


@pytest.mark.parametrize("hidden", [1536, 2048, 3584, 8192])
def test_lm_head_of_the_family(ops, device, hidden):
    assert_matches_reference(ops, "lm_head", *_inputs(2, 97, hidden, torch.bfloat16, device))


@pytest.mark.parametrize("k", [1, 2, 16, 17])
@pytest.mark.parametrize(("tokens", "vocabulary"), [(1, 403), (5, 40), (17, 100)])
def test_top_k(ops, device, tokens, vocabulary, k):
    """The same ids and logits as sorting what lm_head writes."""
    inputs = _inputs(tokens, vocabulary, 896, torch.bfloat16, device)
    with guarded_allocations():
        values, ids = ops.lm_head_top_k(*inputs, k)
    expected, expected_ids = ops.lm_head(*inputs).sort(descending=True, stable=True)
    assert torch.equal(values, expected[:, :k])
    assert torch.equal(ids, expected_ids[:, :k])


def test_every_candidate_is_written(ops, device, monkeypatch):
    """Also those of tiles without rows, which fill the candidates up to a multiple of 16. What is not written is the
    largest here. x is in registers."""
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **keywords: new_empty(*args, **keywords).fill_(2**30))
    x, norm_weight, eps, weight = _inputs(2, 48, 256, torch.bfloat16, device)
    values, ids = ops.lm_head_top_k(x, norm_weight, eps, weight, 2)
    assert torch.equal(values, ops.lm_head(x, norm_weight, eps, weight).gather(1, ids))


def test_top_k_of_all(ops, device):
    """Rows beyond the vocabulary are never among the best, however few are left."""
    inputs = _inputs(3, 9, 896, torch.float32, device)
    _, ids = ops.lm_head_top_k(*inputs, 9)
    assert ids.sort().values.tolist() == [list(range(9))] * 3


@pytest.mark.processor
def test_of_equal_logits_the_lower_id_comes_first(ops, device):
    """Within a tile, and among tiles."""
    x, norm_weight, eps, weight = _exact_inputs(400, 64, device)
    best = int(ops.lm_head(x, norm_weight, eps, weight).argmax())
    for equal in (399, 7, 6, 250):
        weight[equal] = weight[best]
    _, ids = ops.lm_head_top_k(x, norm_weight, eps, weight, 5)
    assert ids.tolist() == [sorted({399, 7, 6, 250, best})]


@pytest.mark.slow
def test_of_equal_logits_far_apart_the_lower_id_comes_first(ops, device):
    """Among more candidates than the second kernel looks at together (8192, and 16 of every 32 rows are some)."""
    x, norm_weight, eps, weight = _exact_inputs(16400, 8, device)
    best = int(ops.lm_head(x, norm_weight, eps, weight).argmax())
    weight[5] = weight[5 + 16384] = weight[best]
    _, ids = ops.lm_head_top_k(x, norm_weight, eps, weight, 16)
    assert ids[0, :3].tolist() == sorted({5, 5 + 16384, best})


def test_the_reference(ops, device):
    inputs = _inputs(2, 50, 64, torch.float64, torch.device("cpu"))
    values, ids = reference.lm_head_top_k(*inputs, 3)
    logits = reference.lm_head(*inputs)
    assert torch.equal(values, logits.topk(3).values)
    assert torch.equal(logits.gather(1, ids), values)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("tokens", "row", "k"), [(1, 0, 1), (3, 402, 1), (3, 200, 5), (17, 200, 1)])
def test_what_is_not_finite_is_seen_in_the_first_value(ops, device, tokens, row, k, value):
    x, norm_weight, eps, weight = _inputs(tokens, 403, 64, torch.bfloat16, device)
    weight[row, x[0].argmax()] = value
    logits = ops.lm_head(x, norm_weight, eps, weight)
    values, ids = ops.lm_head_top_k(x, norm_weight, eps, weight, k)
    seen = logits.isnan().any(-1) | (logits == float("inf")).any(-1)
    assert seen.any(), "nothing to see"
    assert (~values[:, 0].isfinite()).tolist() == seen.tolist()
    assert ((ids >= 0) & (ids < 403)).all()


@pytest.mark.gpu
def test_bits_are_batch_invariant(ops):
    device = torch.device("cuda")
    x, *rest = _inputs(16, 151936, 2048, torch.bfloat16, device)
    together = ops.lm_head(x, *rest)
    for repeat in range(250):
        count = 1 + repeat % 16
        assert torch.equal(ops.lm_head(x[:count], *rest), together[:count])
        assert torch.equal(ops.lm_head_top_k(x[:count], *rest, 1)[1][:, 0], together[:count].argmax(-1))


@pytest.mark.parametrize("k", [0, 41])
def test_bad_k(ops, device, k):
    inputs = _inputs(1, 40, 64, torch.float32, device)
    with pytest.raises(ValueError, match=f"lm_head_top_k: k must be within 1 and the vocabulary's 40, and is {k}"):
        ops.lm_head_top_k(*inputs, k)


def test_registrations(ops, device):
    inputs = _inputs(2, 40, 64, torch.float32, device)
    inputs = *inputs[:-1], [inputs[-1]]
    torch.library.opcheck(torch.ops.qwenkern.lm_head, inputs)
    torch.library.opcheck(torch.ops.qwenkern.lm_head_top_k, (*inputs, 3))


def _inputs(tokens, vocabulary, hidden, dtype, device):
    x = random(tokens, hidden, dtype=dtype, device=device, seed=1)
    norm_weight = (1 + random(hidden, dtype=torch.float32, device=device, seed=3, scale=0.3)).to(dtype)
    weight = random(vocabulary, hidden, dtype=dtype, device=device, seed=4, scale=hidden**-0.5)
    return x, norm_weight, EPS, weight


def _exact_inputs(vocabulary, hidden, device):
    """One token. Equal rows have equal logits wherever they lie in a tile, which no matrix library promises of sums
    that are rounded. An x of plus and minus 1 has a root-mean-square of 1."""
    x = torch.where(exact(1, hidden, dtype=torch.float32, device=device, seed=1) < 0, -1.0, 1.0)
    norm_weight = 1 + exact(hidden, dtype=torch.float32, device=device, seed=3, steps=32)
    weight = exact(vocabulary, hidden, dtype=torch.float32, device=device, seed=4)
    return x, norm_weight, 0.0, weight


_TOP = {"tokens": 5, "vocabulary": 40, "k": 2}
MUTATIONS = [
    Mutation(
        "logits beyond the vocabulary",
        "triton/lm_head.py",
        "[None, :] & (ids < head.vocabulary)",
        "[None, :] & (ids >= 0)",
        test_lm_head,
        {"tokens": 5, "dtype": torch.bfloat16},
    ),
    Mutation(
        "the last row again",
        "triton/lm_head.py",
        'tl.where(ids < head.vocabulary, logits, float("-inf"))',
        "logits",
        test_top_k_of_all,
        {},
    ),
    Mutation(
        "a maximum passes over NaN",
        "triton/lm_head.py",
        'tl.where(logits != logits, float("inf"), logits)',
        "logits",
        test_what_is_not_finite_is_seen_in_the_first_value,
        {"tokens": 3, "row": 200, "k": 5, "value": float("nan")},
    ),
    Mutation(
        "what was taken stays",
        "triton/lm_head.py",
        "ids = tl.where(ids == best_id[None, :], 0x7FFFFFFF, ids)",
        "pass",
        test_top_k,
        _TOP,
    ),
    Mutation(
        "the higher id first",
        "triton/lm_head.py",
        "(found_id < best_id)",
        "(found_id > best_id)",
        test_of_equal_logits_far_apart_the_lower_id_comes_first,
        {},
    ),
    Mutation(
        "equal logits skipped",
        "triton/lm_head.py",
        "(found < value) | ((found == value) & (found_id > taken))",
        "found < value",
        test_of_equal_logits_the_lower_id_comes_first,
        {},
    ),
    Mutation(
        "tiles of one token",
        "triton/lm_head.py",
        "(tokens * head.num_candidates + tile)",
        "(tokens + tile)",
        test_top_k,
        _TOP,
    ),
]
