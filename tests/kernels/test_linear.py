"""The few-token linears against their references."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from unittest import mock

import pytest
import torch
from support.mutations import Mutation
from support.references import assert_matches_reference, assert_rounds_like_reference, random, tensors_left_behind

EPS = 1e-6
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# K of every projection of the family, with N of less than a tile and one row past some tiles
SHAPES = [(896, 896), (17, 1536), (161, 2048), (97, 3584), (65, 4864), (33, 5120), (33, 8192), (17, 8960), (161, 11008)]
SHAPES += [(17, 13824), (33, 18944), (17, 27648), (33, 29568)]


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("tokens", [1, 7])
def test_linear(ops, device, tokens, n, k):
    x, weight, _ = _inputs(tokens, n, k, torch.bfloat16, device)
    assert_matches_reference(ops, "linear", x, weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 16, 17])
def test_linear_with_bias_and_addend(ops, device, tokens, dtype):
    n, k = 272, 1000
    x, weight, bias = _inputs(tokens, n, k, dtype, device)
    addend = random(tokens, n, dtype=dtype, device=device, seed=5)
    assert_matches_reference(ops, "linear", x, weight, bias, addend)
    assert_matches_reference(ops, "linear", x, weight, None, addend)


@pytest.mark.parametrize("tokens", [3, 17])
def test_the_addend_keeps_its_values(ops, device, tokens):
    x, weight, _ = _inputs(tokens, 64, 96, torch.bfloat16, device)
    addend = random(tokens, 64, dtype=x.dtype, device=device, seed=5)
    before = addend.clone()
    out = ops.linear(x, weight, addend=addend)
    assert out.untyped_storage().data_ptr() != addend.untyped_storage().data_ptr()
    assert torch.equal(addend, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_product_is_rounded_before_the_addend_is_added(ops, device, dtype):
    """With the identity for a weight, the product is the sum of x and bias."""
    x, _, bias = _inputs(3, 896, 896, dtype, device)
    addend = random(3, 896, dtype=dtype, device=device, seed=5)
    weight = torch.eye(896, dtype=dtype, device=device)
    assert_rounds_like_reference(ops, "linear", x, weight, bias, addend)


@pytest.mark.parametrize(("n", "k"), [(1, 16), (5, 7), (16, 1), (17, 257), (300, 77)])
def test_odd_sizes(ops, device, n, k):
    """Less than a tile, and rows that no vector load can read."""
    x, weight, bias = _inputs(3, n, k, torch.bfloat16, device)
    norm_weight = _norm_weight(k, x.dtype, device)
    assert_matches_reference(ops, "linear", x, weight, bias)
    assert_matches_reference(ops, "norm_linear", x, norm_weight, EPS, weight, bias)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 16])
def test_programs_share_a_tile(ops, device, tokens):
    """896 rows are too few programs for an H100, so several split K; twice, since they count each other."""
    x, weight, bias = _inputs(tokens, 896, 4864, torch.bfloat16, device)
    with ops.dependent_launches({}):
        first = assert_matches_reference(ops, "linear", x, weight, bias)
        assert torch.equal(first, assert_matches_reference(ops, "linear", x, weight, bias))


def test_a_split_product_keeps_no_tensor(ops, device):
    x, weight = _inputs(1, 16, 2064, torch.bfloat16, device)[:2]
    assert tensors_left_behind(lambda: ops.linear(x, weight)) == []
    with ops.dependent_launches(kept := {}):
        assert tensors_left_behind(lambda: ops.linear(x, weight)) == [each.shape for each in kept.values()] != []


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("ahead", [{}, {"AHEAD": 0}], ids=["ahead", "not_ahead"])
def test_programs_take_several_tiles(ops, device, tokens, ahead):
    """With x in registers, and with and without a tile that is loaded before the kernel waits."""
    x, weight, bias = _inputs(tokens, 214, 250, torch.bfloat16, device)
    addend = random(tokens, 214, dtype=x.dtype, device=device, seed=6)
    with two_multiprocessors(ops, "linear", ahead):
        assert_matches_reference(ops, "linear", x, weight, bias, addend)
    with two_multiprocessors(ops, "norm_swiglu_linear", ahead):
        assert_matches_reference(ops, "norm_swiglu_linear", x, _norm_weight(250, x.dtype, device), EPS, weight)


@pytest.mark.parametrize(
    ("k", "foreign"), [(250, {"SPLIT_K": 2, "BLOCK_K": 128, "PROGRAMS": 0}), (2500, {"PROGRAMS": 2})]
)
def test_a_configuration_of_the_other_design_gives_right_results(ops, device, k, foreign):
    """The nearest tuned sizes may be those of a kernel that streams x, where this one keeps it in registers."""
    x, weight, bias = _inputs(3, 50, k, torch.bfloat16, device)
    with ops.triton.tuning.trying("linear", foreign), ops.dependent_launches({}):
        assert_matches_reference(ops, "linear", x, weight, bias)


@contextlib.contextmanager
def two_multiprocessors(ops, op, config):
    """In this context the kernel of an op has the tiles of a device with two multiprocessors, and fields of its
    configuration are replaced."""
    tuning = ops.triton.tuning
    device = replace(tuning.INTERPRETER, num_sms=2)
    with mock.patch.object(tuning, "device_of", return_value=device), tuning.trying(op, config):
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 7, 16, 17])
@pytest.mark.parametrize(("n", "k"), [(97, 896), (65, 2048)])
def test_norm_linear(ops, device, n, k, tokens, dtype):
    x, weight, bias = _inputs(tokens, n, k, dtype, device)
    norm_weight = _norm_weight(k, dtype, device)
    assert_matches_reference(ops, "norm_linear", x, norm_weight, EPS, weight, bias)


@pytest.mark.parametrize("hidden", [1536, 3584, 5120, 8192])
def test_norm_linear_over_the_family(ops, device, hidden):
    x, weight, _ = _inputs(2, 67, hidden, torch.bfloat16, device)
    assert_matches_reference(ops, "norm_linear", x, _norm_weight(hidden, x.dtype, device), EPS, weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_norm_rounds_like_rms_norm(ops, device, dtype):
    """With the identity for a weight, what comes out is what was normalised."""
    x, *_ = _inputs(3, 1, 896, dtype, device)
    weight = torch.eye(896, dtype=dtype, device=device)
    assert_rounds_like_reference(ops, "norm_linear", x, _norm_weight(896, dtype, device), EPS, weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 16, 17])
def test_norm_swiglu_linear(ops, device, tokens, dtype):
    x, weight, _ = _inputs(tokens, 2 * 300, 896, dtype, device)
    assert_matches_reference(ops, "norm_swiglu_linear", x, _norm_weight(896, dtype, device), EPS, weight)


@pytest.mark.parametrize(("intermediate", "hidden"), [(608, 896), (344, 2048)])
def test_norm_swiglu_linear_of_the_family(ops, device, intermediate, hidden):
    x, weight, _ = _inputs(1, 2 * intermediate, hidden, torch.bfloat16, device)
    assert_matches_reference(ops, "norm_swiglu_linear", x, _norm_weight(hidden, x.dtype, device), EPS, weight)


def test_strided_rows(ops, device):
    x, weight, bias = _inputs(3, 130, 896, torch.bfloat16, device)
    norm_weight = _norm_weight(896, x.dtype, device)
    addend = random(3, 130, dtype=x.dtype, device=device, seed=6)
    for padding in (8, 3):
        assert_matches_reference(ops, "linear", x, weight, bias, addend, padding=padding)
        assert_matches_reference(ops, "norm_linear", x, norm_weight, EPS, weight, bias, padding=padding)


@pytest.mark.gpu
@pytest.mark.parametrize("n", [896, 2048, 2560])
def test_bits_are_batch_invariant(ops, n):
    """One token by itself and among 16, 250 times."""
    device = torch.device("cuda")
    x, weight, bias = _inputs(16, n, 2048, torch.bfloat16, device)
    norm_weight = _norm_weight(2048, x.dtype, device)
    together = ops.norm_linear(x, norm_weight, EPS, weight, bias)
    down = random(n, 11008, dtype=x.dtype, device=device, seed=9, scale=0.02)
    wide = random(16, 11008, dtype=x.dtype, device=device, seed=10)
    stream = random(16, n, dtype=x.dtype, device=device, seed=11)
    projected = ops.linear(wide, down, addend=stream)
    for repeat in range(250):
        count = 1 + repeat % 16
        out = ops.norm_linear(x[:count], norm_weight, EPS, weight, bias)
        assert torch.equal(out, together[:count])
        assert torch.equal(ops.linear(wide[:count], down, addend=stream[:count]), projected[:count])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": (3, 9)}, r"norm_linear: weight must have shape \[N, 8\], and has \[3, 9\]"),
        ({"bias": (4,)}, r"norm_linear: bias must have shape \[3\], and has \[4\]"),
        ({"norm_weight": (7,)}, r"norm_linear: norm_weight must have shape \[8\]"),
        ({"x": (0, 8)}, "norm_linear: x is empty"),
        ({"x": (8,)}, r"norm_linear: x must have shape \[T, K\], and has \[8\]"),
    ],
)
def test_bad_shapes(ops, device, change, message):
    shapes = {"x": (2, 8), "norm_weight": (8,), "weight": (3, 8), "bias": (3,)} | change
    given = {name: torch.ones(shape, device=device) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        ops.norm_linear(**given, eps=EPS)


def test_bad_addends(ops, device):
    x, weight, _ = _inputs(2, 3, 8, torch.float32, device)
    with pytest.raises(ValueError, match=r"linear: addend must have shape \[2, 3\], and has \[2, 8\]"):
        ops.linear(x, weight, addend=x)
    with pytest.raises(TypeError, match="linear: addend must be float32, and is bfloat16"):
        ops.linear(x, weight, addend=x[:, :3].bfloat16())


def test_bad_dtypes_and_halves(ops, device):
    x, weight, _ = _inputs(2, 7, 16, torch.bfloat16, device)
    norm_weight = _norm_weight(16, x.dtype, device)
    with pytest.raises(TypeError, match="linear: weight must be bfloat16, and is float32"):
        ops.linear(x, weight.float())
    with pytest.raises(ValueError, match="norm_swiglu_linear: weight must have an even number of rows, and has 7"):
        ops.norm_swiglu_linear(x, norm_weight, EPS, weight)


def test_registrations(ops, device):
    x, weight, bias = _inputs(2, 6, 16, torch.float32, device)
    norm_weight = _norm_weight(16, x.dtype, device)
    torch.library.opcheck(torch.ops.qwenkern.linear, (x, [weight], bias, None))
    torch.library.opcheck(torch.ops.qwenkern.linear, (x, [weight], None, x[:, :6].contiguous()))
    torch.library.opcheck(torch.ops.qwenkern.norm_linear, (x, norm_weight, EPS, [weight], bias))
    torch.library.opcheck(torch.ops.qwenkern.norm_linear, (x, norm_weight, EPS, [weight]))
    torch.library.opcheck(torch.ops.qwenkern.norm_swiglu_linear, (x, norm_weight, EPS, [weight]))


def _inputs(tokens, n, k, dtype, device):
    """x [tokens, k], weight [n, k] that keeps its scale, bias [n]."""
    sizes = torch.arange(1, tokens + 1, device=device)[:, None].to(dtype)  # tokens of different norms
    x = sizes * random(tokens, k, dtype=dtype, device=device, seed=1)
    weight = random(n, k, dtype=dtype, device=device, seed=3, scale=k**-0.5)
    return x, weight, random(n, dtype=dtype, device=device, seed=4)


def _norm_weight(k, dtype, device):
    return (1 + random(k, dtype=torch.float32, device=device, seed=5, scale=0.3)).to(dtype)


_ODD = {"n": 300, "k": 77}
_SMALL = {"n": 65, "k": 2048, "tokens": 7, "dtype": torch.bfloat16}
MUTATIONS = [
    Mutation(
        "the same tile again",
        "triton/few_tokens.py",
        "for tile in tl.range(first + (step if AHEAD > 0 else 0), num_tiles, step, num_stages=STAGES)",
        "for tile in range(first, num_tiles - step, step)",
        test_programs_take_several_tiles,
        {"tokens": 5, "ahead": {}},
    ),
    Mutation(
        "what was loaded early is forgotten",
        "triton/few_tokens.py",
        "            acc = MULTIPLY(early, early_groups, x, acc, FORM)",
        "            pass",
        test_programs_share_a_tile,
        {"tokens": 1},
    ),
    Mutation(
        "up rows of gate",
        "triton/linear.py",
        "row + places // half * args.n_size",
        "row",
        test_norm_swiglu_linear,
        {"tokens": 5, "dtype": torch.bfloat16},
    ),
    Mutation(
        "no mask at the end of K",
        "triton/few_tokens.py",
        "None if EVEN_K else k < k_end",
        "None if EVEN_K else k < k_end + BLOCK_K",
        test_odd_sizes,
        _ODD,
    ),
    Mutation(
        "rows beyond the weight",
        "triton/linear.py",
        "(tokens[None, :] < num_tokens) & (rows < args.n_size)",
        "(tokens[None, :] < num_tokens)",
        test_odd_sizes,
        _ODD,
    ),
    Mutation(
        "tokens beyond the batch",
        "triton/linear.py",
        "(tokens[None, :] < num_tokens) & (rows < args.n_size)",
        "(rows < args.n_size)",
        test_odd_sizes,
        _ODD,
    ),
    Mutation(
        "part of another split",
        "triton/few_tokens.py",
        "parts + other_split * part",
        "parts",
        test_programs_share_a_tile,
        {"tokens": 1},
    ),
    Mutation(
        "a part lost",
        "triton/few_tokens.py",
        "for other_split in range(SPLIT_K)",
        "for other_split in range(1, SPLIT_K)",
        test_programs_share_a_tile,
        {"tokens": 1},
    ),
    Mutation(
        "arrivals not reset",
        "triton/few_tokens.py",
        "tl.store(arrivals_ptr + first, 0)",
        "pass",
        test_programs_share_a_tile,
        {"tokens": 1},
    ),
    Mutation(
        "a slice lost",
        "triton/few_tokens.py",
        "tl.sum(acc, axis=0)",
        "tl.sum(tl.where(tl.arange(0, SLICES)[:, None, None] == 1, 0.0, acc), axis=0)",
        test_programs_share_a_tile,
        {"tokens": 1},
    ),
    Mutation(
        "norm weight before rounding",
        "triton/few_tokens.py",
        "round_to(x * scales, dtype)",
        "(x * scales)",
        test_the_norm_rounds_like_rms_norm,
        {"dtype": torch.bfloat16},
    ),
    Mutation(
        "product not rounded before the addend",
        "triton/linear.py",
        "round_to(products, args.out.dtype.element_ty) + inputs[1]",
        "products + inputs[1]",
        test_the_product_is_rounded_before_the_addend_is_added,
        {"dtype": torch.bfloat16},
    ),
    Mutation(
        "one token's scale for all, x streamed",
        "triton/few_tokens.py",
        "tokens[:, None] == row[None, :]",
        "row[None, :] == 0",
        test_norm_linear_over_the_family,
        {"hidden": 3584},
    ),
    Mutation(
        "one scale for all tokens, x resident",
        "triton/few_tokens.py",
        "tl.sum(h * h, axis=1) / k_size",
        "tl.sum(h * h) / k_size + tl.zeros([BLOCK_T], tl.float32)",
        test_norm_linear,
        _SMALL,
    ),
    Mutation(
        "addend of the first token for all",
        "triton/linear.py",
        "tl.minimum(tokens, num_tokens - 1)[None, :] * args.addend_stride + rows",
        "tokens[None, :] * 0 + rows",
        test_linear_with_bias_and_addend,
        {"tokens": 3, "dtype": torch.float32},
    ),
    Mutation(
        "many tokens lose their addend",
        "triton/many_tokens.py",
        "torch.addmm(addend, x, weight.tensor.t())",
        "torch.mm(x, weight.tensor.t())",
        test_linear_with_bias_and_addend,
        {"tokens": 17, "dtype": torch.float32},
    ),
    Mutation(
        "gate and up exchanged",
        "triton/linear.py",
        "silu(gate) * up",
        "silu(up) * gate",
        test_norm_swiglu_linear,
        {"tokens": 5, "dtype": torch.float32},
    ),
    Mutation(
        "bias forgotten",
        "triton/linear.py",
        "    if args.bias is not None:\n        products += inputs[0]",
        "    pass",
        test_programs_share_a_tile,
        {"tokens": 1},
    ),
]
