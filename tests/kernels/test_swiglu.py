"""swiglu against its reference."""

from __future__ import annotations

import pytest
import torch
from support.mutations import Mutation
from support.references import assert_matches_reference, assert_rounds_like_reference, random


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("columns", [4864, 8960, 11008, 18944, 27648, 29568, 1, 77, 257])
def test_swiglu(ops, device, columns, rows, dtype):
    assert_matches_reference(ops, "swiglu", random(rows, 2 * columns, dtype=dtype, device=device, scale=3.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("columns", [4864, 11008, 1, 257])
def test_two_projections(ops, device, columns, dtype):
    gate, up = (random(5, columns, dtype=dtype, device=device, seed=seed, scale=3.0) for seed in (1, 2))
    assert_matches_reference(ops, "silu_mul", gate, up, padding=3)
    packed = torch.cat((gate, up), dim=-1)
    assert torch.equal(ops.silu_mul(*packed.chunk(2, dim=-1)), ops.swiglu(packed))


@pytest.mark.parametrize("rows", [128, 300])
def test_many_rows(ops, device, rows):
    assert_matches_reference(ops, "swiglu", random(rows, 2 * 300, dtype=torch.bfloat16, device=device))


@pytest.mark.parametrize("padding", [8, 3])
def test_strided_rows(ops, device, padding):
    assert_matches_reference(ops, "swiglu", random(5, 2 * 300, dtype=torch.bfloat16, device=device), padding=padding)


def test_leading_dimensions(ops, device):
    assert_matches_reference(ops, "swiglu", random(2, 3, 64, dtype=torch.bfloat16, device=device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_roundings(ops, device, dtype):
    assert_rounds_like_reference(ops, "swiglu", random(3, 4096, dtype=dtype, device=device))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of the interpreter's numpy
def test_large_values(ops, device):
    """exp(-gate) overflows; silu does not."""
    gate_up = torch.tensor([[-1e4, -200.0, -88.0, 0.0, 88.0, 1e4] + [2.0] * 6], device=device)
    assert_matches_reference(ops, "swiglu", gate_up)


def test_bad_input(ops, device):
    with pytest.raises(ValueError, match="swiglu: gate_up's last dimension must be even, and is 7"):
        ops.swiglu(torch.ones(2, 7, device=device))
    with pytest.raises(ValueError, match=r"swiglu: gate_up is empty, with shape \[2, 0\]"):
        ops.swiglu(torch.ones(2, 0, device=device))
    with pytest.raises(TypeError, match="swiglu: gate_up must be float32 or"):
        ops.swiglu(torch.ones(1, 8, device=device, dtype=torch.int64))


def test_bad_pair(ops, device):
    with pytest.raises(ValueError, match=r"silu_mul: up must have shape \[2, 8\], and has \[2, 7\]"):
        ops.silu_mul(torch.ones(2, 8, device=device), torch.ones(2, 7, device=device))


def test_registration(ops, device):
    pair = (random(2, 8, dtype=torch.float32, device=device), random(2, 8, dtype=torch.float32, device=device, seed=1))
    torch.library.opcheck(torch.ops.qwenkern.silu_mul, pair)
    torch.library.opcheck(torch.ops.qwenkern.swiglu, (random(2, 8, dtype=torch.float32, device=device),))


_ROW = {"rows": 7, "columns": 257, "dtype": torch.bfloat16}
MUTATIONS = [
    Mutation(
        "silu not rounded",
        "triton/swiglu.py",
        "round_to(silu(gate), dtype)",
        "silu(gate)",
        test_roundings,
        {"dtype": torch.bfloat16},
    ),
    Mutation(
        "gate and up exchanged",
        "triton/swiglu.py",
        "silu(gate), dtype) * up",
        "silu(up), dtype) * gate",
        test_swiglu,
        _ROW,
    ),
    Mutation(
        "no mask at the tail", "triton/swiglu.py", "mask = column < columns", "mask = column >= 0", test_swiglu, _ROW
    ),
    Mutation(
        "rows taken for dense",
        "triton/swiglu.py",
        "row * up_stride",
        "row * columns",
        test_strided_rows,
        {"padding": 8},
    ),
    Mutation("sigmoid for silu", "language.py", "return x / (1.0", "return 1.0 / (1.0", test_swiglu, _ROW),
]
