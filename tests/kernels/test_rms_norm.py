"""rms_norm and add_rms_norm against their reference."""

from __future__ import annotations

import pytest
import torch
from support.mutations import Mutation
from support.references import assert_matches_reference, assert_rounds_like_reference, random

EPS = 1e-6
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
HIDDEN = [896, 1536, 2048, 3584, 5120, 8192]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [*HIDDEN, 1, 77, 2049])
@pytest.mark.parametrize("rows", [1, 2, 7, 8])
def test_rms_norm(ops, device, rows, hidden, dtype):
    x, weight = _inputs(rows, hidden, dtype, device)
    assert_matches_reference(ops, "rms_norm", x, weight, EPS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [*HIDDEN, 77, 2049])
@pytest.mark.parametrize("rows", [1, 7])
def test_add_rms_norm(ops, device, rows, hidden, dtype):
    x, weight = _inputs(rows, hidden, dtype, device)
    residual = random(rows, hidden, dtype=dtype, device=device, seed=2, scale=3.0)
    assert_matches_reference(ops, "add_rms_norm", x, residual, weight, EPS)


@pytest.mark.parametrize("rows", [2200, 1057])
def test_several_rows_a_program(ops, device, rows):
    """Narrow and many: the last program has rows left over."""
    x, weight = _inputs(rows, 16, torch.bfloat16, device)
    residual = random(rows, 16, dtype=x.dtype, device=device, seed=2)
    assert_matches_reference(ops, "add_rms_norm", x, residual, weight, EPS)


@pytest.mark.parametrize("padding", [8, 3])
def test_strided_rows(ops, device, padding):
    x, weight = _inputs(7, 896, torch.bfloat16, device)
    residual = random(7, 896, dtype=x.dtype, device=device, seed=2)
    assert_matches_reference(ops, "add_rms_norm", x, residual, weight, EPS, padding=padding)
    assert_matches_reference(ops, "rms_norm", x, weight, EPS, padding=padding)


def test_leading_dimensions(ops, device):
    x, weight = _inputs(6, 896, torch.bfloat16, device)
    assert_matches_reference(ops, "rms_norm", x.view(2, 3, 896), weight, EPS)


def test_a_stream_begins_with_x(ops, device):
    x, weight = _inputs(3, 896, torch.bfloat16, device)
    out, residual = ops.add_rms_norm(x, None, weight, EPS)
    assert residual is x
    assert torch.equal(out, ops.rms_norm(x, weight, EPS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_roundings(ops, device, dtype):
    """bfloat16's cast order is the most repeated bug of the field."""
    x, weight = _inputs(7, 2048, dtype, device)
    residual = random(7, 2048, dtype=dtype, device=device, seed=2, scale=3.0)
    assert_rounds_like_reference(ops, "add_rms_norm", x, residual, weight, EPS)


def test_small_values_lean_on_eps(ops, device):
    x, weight = _inputs(2, 2048, torch.float32, device)
    assert_matches_reference(ops, "rms_norm", x * 1e-4, weight, 1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w: (x, w[:-1]), r"rms_norm: weight must have shape \[896\], and has \[895\]"),
        (lambda x, w: (x, w.float()), "weight must be bfloat16, and is float32"),
        (lambda x, w: (x.int(), w), "x must be float32 or bfloat16 or float16 or float64, and is int32"),
        (lambda x, w: (x[:, :0], w[:0]), r"x is empty, with shape \[4, 0\]"),
        (lambda x, w: (x.t().contiguous().t(), w), "x's last dimension must be contiguous, and its stride is 4"),
        (lambda x, w: (x.tolist(), w), "x must be a tensor, and is list"),
        (lambda x, w: (x, w.to("meta")), "weight is on meta, and x on"),
    ],
)
def test_bad_input(ops, device, change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        ops.rms_norm(*change(*_inputs(4, 896, torch.bfloat16, device)), EPS)


def _inputs(rows, hidden, dtype, device):
    weight = 1 + random(hidden, dtype=torch.float32, device=device, seed=1, scale=0.3)
    return random(rows, hidden, dtype=dtype, device=device), weight.to(dtype)


_ROW = {"rows": 7, "hidden": 896, "dtype": torch.bfloat16}
_BF16 = {"dtype": torch.bfloat16}
MUTATIONS = [
    Mutation(
        "weight before rounding",
        "triton/rms_norm.py",
        "round_to(x * scale, dtype)",
        "(x * scale)",
        test_roundings,
        _BF16,
    ),
    Mutation(
        "sum not rounded", "triton/rms_norm.py", "round_to(x + residual, dtype)", "x + residual", test_roundings, _BF16
    ),
    Mutation("no mask at the tail", "triton/rms_norm.py", " & (columns < hidden)\n", "\n", test_rms_norm, _ROW),
    Mutation(
        "no mask below", "triton/rms_norm.py", "(rows < num_rows) & ", "", test_several_rows_a_program, {"rows": 1057}
    ),
    Mutation("mean over the block", "triton/rms_norm.py", "/ hidden + eps", "/ BLOCK_H + eps", test_rms_norm, _ROW),
    Mutation("eps forgotten", "triton/rms_norm.py", "/ hidden + eps", "/ hidden", test_small_values_lean_on_eps, {}),
]
