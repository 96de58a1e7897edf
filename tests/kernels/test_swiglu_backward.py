"""swiglu_backward and silu_mul_backward against their references."""

from __future__ import annotations

import pytest
import torch
from support.mutations import Mutation
from support.references import assert_matches_reference, assert_rounds_like_reference, random

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("columns", [4864, 11008, 18944, 1, 77, 257])
def test_swiglu_backward(ops, device, columns, rows, dtype):
    assert_matches_reference(ops, "swiglu_backward", *_inputs(rows, columns, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [4864, 257])
def test_two_projections(ops, device, columns, dtype):
    grad, gate_up = _inputs(5, columns, dtype, device)
    halves = gate_up.chunk(2, dim=-1)
    assert_matches_reference(ops, "silu_mul_backward", grad, *halves, padding=3)
    packed = ops.swiglu_backward(grad, gate_up)
    assert torch.equal(torch.cat(ops.silu_mul_backward(grad, *halves), dim=-1), packed)


@pytest.mark.parametrize("rows", [130, 300])
def test_many_rows(ops, device, rows):
    assert_matches_reference(ops, "swiglu_backward", *_inputs(rows, 300, torch.bfloat16, device))


@pytest.mark.parametrize("padding", [8, 3])
def test_strided_rows(ops, device, padding):
    assert_matches_reference(ops, "swiglu_backward", *_inputs(5, 300, torch.bfloat16, device), padding=padding)


def test_leading_dimensions(ops, device):
    grad, gate_up = _inputs(6, 32, torch.bfloat16, device)
    assert_matches_reference(ops, "swiglu_backward", grad.view(2, 3, 32), gate_up.view(2, 3, 64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_roundings(ops, device, dtype):
    """Of silu in the gradient of up."""
    assert_rounds_like_reference(ops, "swiglu_backward", *_inputs(3, 2048, dtype, device))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of the interpreter's numpy
def test_large_values(ops, device):
    """exp(-gate) overflows; the slope does not."""
    gate = torch.tensor([[-1e4, -200.0, -88.0, 0.0, 88.0, 1e4]], device=device)
    assert_matches_reference(ops, "silu_mul_backward", torch.ones_like(gate), gate, torch.full_like(gate, 2.0))


@pytest.mark.parametrize(
    ("at", "change", "message"),
    [
        (0, lambda grad: grad[:, 1:], r"swiglu_backward: grad must have shape \[2, 8\], and has \[2, 7\]"),
        (0, lambda grad: grad.half(), "grad must be float32, and is float16"),
        (1, lambda gate_up: gate_up[:, 1:], "swiglu_backward: gate_up's last dimension must be even, and is 15"),
        (1, lambda gate_up: gate_up.to("meta"), "gate_up is on meta, and grad on"),
    ],
)
def test_bad_input(ops, device, at, change, message):
    inputs = list(_inputs(2, 8, torch.float32, device))
    inputs[at] = change(inputs[at])
    with pytest.raises((TypeError, ValueError), match=message):
        ops.swiglu_backward(*inputs)


def test_bad_pair(ops, device):
    ones = torch.ones(2, 8, device=device)
    with pytest.raises(ValueError, match=r"silu_mul_backward: up must have shape \[2, 8\], and has \[2, 7\]"):
        ops.silu_mul_backward(ones, ones, torch.ones(2, 7, device=device))
    with pytest.raises(ValueError, match=r"silu_mul_backward: grad must have shape \[2, 8\], and has \[1, 8\]"):
        ops.silu_mul_backward(ones[:1], ones, ones)


def test_registration(ops, device):
    grad, gate_up = _inputs(2, 8, torch.float32, device)
    torch.library.opcheck(torch.ops.qwenkern.swiglu_backward, (grad, gate_up))
    torch.library.opcheck(torch.ops.qwenkern.silu_mul_backward, (grad, *gate_up.chunk(2, dim=-1)))


def _inputs(rows, columns, dtype, device):
    """grad and gate_up."""
    grad = random(rows, columns, dtype=dtype, device=device)
    return grad, random(rows, 2 * columns, dtype=dtype, device=device, seed=1, scale=3.0)


_ROW = {"rows": 7, "columns": 257, "dtype": torch.bfloat16}
_FILE = "triton/swiglu_backward.py"
MUTATIONS = [
    Mutation(
        "silu not rounded",
        _FILE,
        "round_to(silu(gate), dtype)",
        "silu(gate)",
        test_roundings,
        {"dtype": torch.bfloat16},
    ),
    Mutation("half of the slope", _FILE, "1.0 + gate * (1.0 - sigmoid)", "1.0", test_swiglu_backward, _ROW),
    Mutation("gate for up", _FILE, "grad * up * slope", "grad * gate * slope", test_swiglu_backward, _ROW),
    Mutation("no mask at the tail", _FILE, "mask = column < columns", "mask = column >= 0", test_swiglu_backward, _ROW),
    Mutation("up taken for dense", _FILE, "row * up_stride", "row * columns", test_strided_rows, {"padding": 8}),
    Mutation("grad taken for packed", _FILE, "row * grad_stride", "row * up_stride", test_swiglu_backward, _ROW),
    Mutation(
        "the results taken for dense",
        _FILE,
        "grad_up_ptr + row * out_stride",
        "grad_up_ptr + row * columns",
        test_swiglu_backward,
        _ROW,
    ),
]
