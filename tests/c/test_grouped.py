"""Linears, embedding and head with quantised weights in C, on every target and as plain loops.

Products are compared with float64 results for the dequantised weights. x may have the errors of its int8 planes."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from c import emulated
from c.test_ops import EPS, Plain, fast, in_c, tensor, torchs  # noqa: F401  # the fixture runs by itself
from support.planes import assert_product_of_planes
from support.references import guarded_allocations, mapped
from support.tolerances import assert_as_close_as

from qwenkern.kernels import c as c_backend
from qwenkern.kernels.c import recorded_calls
from qwenkern.kernels.c.backend import C
from qwenkern.kernels.environment import CPU_ACTIVATIONS
from qwenkern.kernels.weights import FORMATS, Grouped, Stack, Weight

QUANTISED = [name for name, form in FORMATS.items() if issubclass(form, Grouped)]
ROWS = 48
BIASED = ("linear", "norm_linear")


@functools.cache  # rounding takes long, and no test changes one
def made(
    form: str, rows: int = ROWS, columns: int = 256, dtype=torch.float32, seed: int = 3, group: int | None = None
) -> Grouped:
    """A weight of the format whose values have about the size that a layer's have."""
    weight = FORMATS[form].allocate(rows, columns, dtype, lambda shape, dtype: torch.empty(shape, dtype=dtype), group)
    weight.copy_(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * columns**-0.5)
    return weight


def calls(weight: Weight, tokens: int, dtype=torch.float32, seed: int = 0) -> dict[str, tuple]:
    """Arguments of every op that multiplies by a weight. Rows of x and of the addend are apart."""
    rows, columns = weight.shape
    x = tensor(tokens, columns + 32, seed=seed).to(dtype)[:, :-32]
    addend = tensor(tokens, rows + 16, seed=seed + 1).to(dtype)[:, 16:]
    norm, bias = (1 + 0.1 * tensor(columns, seed=seed + 2)).to(dtype), tensor(rows, seed=seed + 3).to(dtype)
    normed = (x, norm, EPS, weight)
    return {
        "linear": (x, weight, bias, addend),
        "norm_linear": (*normed, bias),
        "norm_swiglu_linear": normed,
        "lm_head": normed,
    }


def run(name: str, *args: Any) -> torch.Tensor:
    """The op in C, which must take it, with canaries around what it allocates."""
    assert C.implementations[name].refuses(*args) is None
    if emulated.is_emulated():
        return getattr(fast, name)(*args)
    with guarded_allocations():
        return getattr(fast, name)(*args)


@pytest.mark.parametrize("tokens", [1, 2, 33])
@pytest.mark.parametrize("form", QUANTISED)
def test_a_product_is_as_exact_as_two_planes(form: str, tokens: int) -> None:
    for name, args in calls(made(form, rows=64), tokens).items():
        assert_product_of_planes(run(name, *args), name, *args)


@pytest.mark.parametrize("form", QUANTISED)
def test_in_bfloat16_it_is_as_close_to_float64_as_torch(form: str) -> None:
    for name, args in calls(made(form, dtype=torch.bfloat16), 3, torch.bfloat16).items():
        exact = [mapped(lambda each: each.double() if each.is_floating_point() else each, arg) for arg in args]
        assert_as_close_as(run(name, *args), getattr(torchs, name)(*args), getattr(torchs, name)(*exact))


@pytest.mark.parametrize(("n", "k"), [(16, 32), (160, 896), (32, 4864)])
@pytest.mark.parametrize("tokens", [1, 40])
def test_every_size(tokens: int, n: int, k: int) -> None:
    for form in ("q5_0", "q8_0"):
        args = calls(made(form, n, k), tokens)["linear"]
        assert_product_of_planes(run("linear", *args), "linear", *args)


@pytest.mark.parametrize("scales", [torch.int16, torch.int32], ids=str)
@pytest.mark.parametrize("form", ["int4", "int8"])
def test_a_group_may_have_any_multiple_of_32_values(form: str, scales: torch.dtype) -> None:
    for group in (32, 96, 128, 384):
        tensors = list(made(form, columns=384, group=group).tensors)
        if scales == torch.int32:  # the same values
            tensors[1] = tensors[1].view(torch.float16).float().view(torch.int32)
        weight = FORMATS[form](*tensors)
        args = calls(weight, 3)["linear"]
        assert_product_of_planes(run("linear", *args), "linear", *args)


@pytest.mark.parametrize("form", QUANTISED)
def test_a_tokens_bits_depend_on_neither_batch_nor_threads(form: str) -> None:
    weight = made(form, rows=80)
    for name, args in calls(weight, 70).items():
        together, threads = run(name, *args), torch.get_num_threads()
        try:
            torch.set_num_threads(3)
            for row in (0, 1, 34, 35, 69):
                own = [a[row : row + 1] if isinstance(a, torch.Tensor) and a.dim() == 2 else a for a in args]
                assert torch.equal(run(name, *own)[0], together[row])
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("form", QUANTISED)
def test_one_plane_is_taken_where_it_is_asked_for(form: str, monkeypatch) -> None:
    args = calls(made(form), 5)["linear"]
    two = run("linear", *args)
    monkeypatch.setenv(CPU_ACTIVATIONS.name, "int8")
    one = run("linear", *args)
    assert_product_of_planes(one, "linear", *args, planes=1)
    if not isinstance(c_backend.library(), Plain):
        assert not torch.equal(one, two)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("form", QUANTISED)
def test_a_number_of_x_that_is_not_finite_makes_its_token_not_finite(form: str, value: float) -> None:
    for tokens in (1, 3):
        args = calls(made(form), tokens)["linear"]
        expected = run("linear", *args)
        args[0][tokens - 1, 37] = value
        out = run("linear", *args)
        assert not out[-1].isfinite().any()
        assert torch.equal(out[:-1], expected[:-1])


def test_zeros_and_what_is_far_too_small_add_nothing() -> None:
    for form in QUANTISED:
        x, weight, bias, _ = calls(made(form), 3)["linear"]
        x[0], x[1] = 0, 1e-38
        out = run("linear", x, weight, bias)
        assert torch.equal(out[0], bias)
        assert torch.equal(out[1], bias)
        x[:, 32:64] *= 1e30
        args = (x, weight, bias)
        assert_product_of_planes(run("linear", *args), "linear", *args)


def test_a_stack_is_its_parts_side_by_side() -> None:
    """In a product and as gate and up of several formats."""
    upper, lower = made("q4_k", rows=32), made("q6_k", rows=64, seed=9)
    for name, args in calls(Stack((upper, lower)), 3).items():
        if name == "norm_swiglu_linear":
            assert_product_of_planes(run(name, *args), name, *args)
            continue
        parts = []
        for part, columns in ((upper, slice(0, 32)), (lower, slice(32, 96))):
            own = [part if isinstance(arg, Stack) else arg for arg in args]
            if name == "linear":
                own[2:] = own[2][columns], own[3][:, columns]
            elif name == "norm_linear":
                own[4] = own[4][columns]
            parts.append(run(name, *own))
        assert torch.equal(run(name, *args), torch.cat(parts, dim=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_embedding_dequantises_rows(dtype: torch.dtype) -> None:
    ids = torch.tensor([5, 47, 0, 16, 5])
    for form in QUANTISED:
        weight = made(form, dtype=dtype)
        assert torch.equal(run("embedding", ids, weight), weight.dequantise()[ids])


def test_the_largest_logits() -> None:
    weight = made("q8_0")
    x, norm = tensor(3, 256, seed=0).float(), torch.ones(256)
    assert C.implementations["lm_head_top_k"].refuses(x, norm, EPS, weight, 4) is None
    values, ids = fast.lm_head_top_k(x, norm, EPS, weight, 4)
    logits = run("lm_head", x, norm, EPS, weight)
    assert torch.equal(values, logits.gather(1, ids))
    assert torch.equal(values, logits.sort(dim=1, descending=True).values[:, :4])


def test_recorded_calls_compute_the_same(request) -> None:
    emulated.skip_large(request)
    if isinstance(c_backend.library(), Plain) or emulated.is_emulated():
        pytest.skip("replays in the compiled library")
    stack = Stack((made("q4_k", rows=32), made("q6_k", rows=64, seed=9)))
    args = [*calls(made("q5_0", rows=64), 2).items(), *calls(stack, 2).items()]
    ids, table = torch.tensor([3, 40]), made("q8_0")
    expected = [run(name, *each) for name, each in args] + [run("embedding", ids, table)]
    recorded = recorded_calls.RecordedCalls()
    with recorded.record():
        outs = [getattr(fast, name)(*each) for name, each in args] + [fast.embedding(ids, table)]
    recorded.replay()
    assert all(torch.equal(out, right) for out, right in zip(outs, expected, strict=True))
