"""rms_norm_backward against its reference."""

from __future__ import annotations

import pytest
import torch
from support.mutations import Mutation
from support.references import assert_matches_reference, assert_rounds_like_reference, guard, random

from qwenkern.kernels import reference

EPS = 1e-6
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [896, 2048, 3584, 8192, 1, 77, 2049])
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_add_rms_norm(ops, device, rows, hidden, dtype):
    assert_matches_reference(ops, "rms_norm_backward", *_inputs(rows, hidden, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [896, 77])
def test_rms_norm(ops, device, hidden, dtype):
    grad, _, *rest = _inputs(5, hidden, dtype, device)
    assert_matches_reference(ops, "rms_norm_backward", grad, None, *rest)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_rows(ops, device, dtype):
    assert_matches_reference(ops, "rms_norm_backward", *_inputs(130, 2048, dtype, device))


@pytest.mark.parametrize("rows", [256, 259])
def test_many_programs(ops, device, rows):
    """64 partial sums, and one more: the last program has rows left over, the second kernel parts."""
    assert_matches_reference(ops, "rms_norm_backward", *_inputs(rows, 16, torch.float32, device))


@pytest.mark.parametrize("padding", [8, 3])
def test_strided_rows(ops, device, padding):
    assert_matches_reference(ops, "rms_norm_backward", *_inputs(7, 896, torch.bfloat16, device), padding=padding)


def test_rows_of_different_strides(ops, device):
    grad, grad_residual, x, *rest = _inputs(3, 64, torch.float32, device)
    wide = [guard(each, padding) for padding, each in enumerate((grad, grad_residual, x))]
    for out, expected in zip(
        ops.rms_norm_backward(*wide, *rest), ops.rms_norm_backward(grad, grad_residual, x, *rest), strict=True
    ):
        assert torch.equal(out, expected)


def test_leading_dimensions(ops, device):
    grad, grad_residual, x, *rest = _inputs(6, 64, torch.bfloat16, device)
    folded = (each.view(2, 3, 64) for each in (grad, grad_residual, x))
    assert_matches_reference(ops, "rms_norm_backward", *folded, *rest)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_roundings(ops, device, dtype):
    """Of one row, so that the weight's gradient is one product, and one rounding more or less shows."""
    assert_rounds_like_reference(ops, "rms_norm_backward", *_inputs(1, 8192, dtype, device))


def test_small_values_lean_on_eps(ops, device):
    grad, grad_residual, x, weight, _ = _inputs(2, 2048, torch.float32, device)
    assert_matches_reference(ops, "rms_norm_backward", grad, grad_residual, x * 1e-4, weight, 1e-5)


def test_the_same_bits_every_time(ops, device):
    inputs = _inputs(259 if device.type == "cpu" else 4099, 256, torch.bfloat16, device)
    first = ops.rms_norm_backward(*inputs)
    for _ in range(1 if device.type == "cpu" else 250):
        assert all(torch.equal(*pair) for pair in zip(first, ops.rms_norm_backward(*inputs), strict=True))


@pytest.mark.parametrize(
    ("at", "change", "message"),
    [
        (0, lambda grad: grad[:1], r"rms_norm_backward: grad must have shape \[4, 96\], and has \[1, 96\]"),
        (0, lambda grad: grad.float(), "grad must be bfloat16, and is float32"),
        (1, lambda grad: grad[:, :-1], r"grad_residual must have shape \[4, 96\], and has \[4, 95\]"),
        (2, lambda x: x.t().contiguous().t(), "x's last dimension must be contiguous, and its stride is 4"),
        (3, lambda weight: weight[:-1], r"weight must have shape \[96\], and has \[95\]"),
        (3, lambda weight: weight.to("meta"), "weight is on meta, and grad on"),
    ],
)
def test_bad_input(ops, device, at, change, message):
    inputs = list(_inputs(4, 96, torch.bfloat16, device))
    inputs[at] = change(inputs[at])
    with pytest.raises((TypeError, ValueError), match=message):
        ops.rms_norm_backward(*inputs)


def test_wider_rows_run_on_the_reference(ops, device):
    inputs = _inputs(1, 16385, torch.float32, device)
    outs, expected = ops.rms_norm_backward(*inputs), reference.rms_norm_backward(*inputs)
    assert all(torch.equal(*pair) for pair in zip(outs, expected, strict=True))


def test_registration(ops, device):
    grad, grad_residual, *rest = _inputs(2, 16, torch.float32, device)
    for residual in (grad_residual, None):
        torch.library.opcheck(torch.ops.qwenkern.rms_norm_backward, (grad, residual, *rest))


def _inputs(rows, hidden, dtype, device):
    """grad, grad_residual, x, weight, eps."""
    grad, residual, x = (
        random(rows, hidden, dtype=dtype, device=device, seed=seed, scale=1.0 + seed) for seed in range(3)
    )
    weight = 1 + random(hidden, dtype=torch.float32, device=device, seed=3, scale=0.3)
    return grad, residual, x, weight.to(dtype), EPS


_ROW = {"rows": 7, "hidden": 77, "dtype": torch.float32}
_FILE = "triton/rms_norm_backward.py"
MUTATIONS = [
    Mutation("no projection", _FILE, "(scaled - normed * (", "(scaled - 0.0 * (", test_add_rms_norm, _ROW),
    Mutation(
        "mean over the block",
        _FILE,
        "tl.sum(scaled * normed) / hidden",
        "tl.sum(scaled * normed) / BLOCK_H",
        test_add_rms_norm,
        _ROW,
    ),
    Mutation("quotient not rounded", _FILE, "round_to(normed, dtype)", "normed", test_roundings, {"dtype": DTYPES[0]}),
    Mutation(
        "residual's gradient lost", _FILE, "grad_x += residual", "grad_x += 0.0 * residual", test_add_rms_norm, _ROW
    ),
    Mutation("weight in its own gradient", _FILE, "part += grad *", "part += grad * weight *", test_add_rms_norm, _ROW),
    Mutation("eps forgotten", _FILE, "/ hidden + eps", "/ hidden", test_small_values_lean_on_eps, {}),
    Mutation(
        "rows of the next program",
        _FILE,
        "tl.minimum(first + rows_each, num_rows)",
        "tl.minimum(first + rows_each + 1, num_rows)",
        test_many_programs,
        {"rows": 256},
    ),
    Mutation(
        "rows beyond the last",
        _FILE,
        "tl.minimum(first + rows_each, num_rows)",
        "first + rows_each",
        test_many_programs,
        {"rows": 259},
    ),
    Mutation(
        "parts beyond the last", _FILE, "(part < num_parts) & ", "(part >= 0) & ", test_many_programs, {"rows": 259}
    ),
    Mutation(
        "the first parts only", _FILE, "range(0, num_parts, BLOCK_P)", "range(0, 1)", test_many_programs, {"rows": 259}
    ),
    Mutation("grad taken for dense", _FILE, "row * grad_stride", "row * hidden", test_strided_rows, {"padding": 8}),
]
