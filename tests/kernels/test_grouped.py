"""The layout of quantised weights, byte by byte as in grouped.py's docstring, and its values. test_weights.py has the
tests of all formats."""

from __future__ import annotations

import pytest
import torch
from support.planes import assert_product_of_planes
from support.tolerances import ROUNDING_ERRORS

from qwenkern.kernels.weights import FORMATS, Dense, Grouped, Stack, as_weight, joined

FORMS = [name for name, form in FORMATS.items() if issubclass(form, Grouped)]
ROWS, COLUMNS = 32, 512


def random_weight(form: str, dtype: torch.dtype = torch.float64, seed: int = 0, rows: int = ROWS) -> Grouped:
    """Random bits in every tensor, with finite scales."""
    generator = torch.Generator().manual_seed(seed)

    def bits(shape, dtype):
        if dtype.is_floating_point:
            return torch.empty(shape, dtype=dtype)
        if dtype == torch.int16:
            return torch.randn(shape, generator=generator).half().view(dtype)
        info = torch.iinfo(dtype)
        return torch.randint(info.min, info.max, shape, dtype=dtype, generator=generator)

    return FORMATS[form].allocate(rows, COLUMNS, dtype, bits)


@pytest.mark.parametrize("form", FORMS)
def test_each_code_lies_where_the_docstring_says(form):
    weight = random_weight(form)
    codes, high = weight.codes.numpy(), None if weight.high is None else weight.high.numpy()
    found = weight.unpacked()
    assert found.shape == (ROWS, COLUMNS)
    for n, k in [(0, 0), (17, 5), (31, 511), *torch.randint(0, ROWS, (300, 2)).mul(torch.tensor([1, 16])).tolist()]:
        tile, row, of_tile, place = n // 16, n % 16, k // 32, k % 32
        word, byte = 4 * (place // 16) + place % 4, place % 16 // 4
        if weight.bits == 8:
            expected = codes[tile, of_tile, word, row] >> 8 * byte & 255
        else:
            expected = codes[tile, of_tile, word % 4, row] >> 8 * byte + 4 * (word // 4) & 15
        if weight.bits == 5:
            expected |= (high[tile, of_tile, 0, row] >> 8 * byte + word & 1) << 4
        if weight.bits == 6:
            expected |= (high[tile, of_tile, word // 4, row] >> 8 * byte + 2 * (word % 4) & 3) << 4
        assert found[n, k] == expected, (n, k)


@pytest.mark.parametrize("form", FORMS)
def test_each_value_is_the_formula_of_its_parts(form):
    weight = random_weight(form)
    matrix, codes, parts = weight.dequantise(), weight.unpacked(), weight.of_groups()
    for n, k in torch.randint(0, ROWS, (200, 2)).mul(torch.tensor([1, 16])).tolist():
        group, of_super = k // weight.values_of_group, k // 256
        at = of_super if weight.super_scales else group
        scale, low = float(parts["scales"][n, at]), 0.0
        if weight.has_minima:
            low = float(parts["minima"][n, at])
        if weight.super_scales:
            scale *= int(parts["sub_scales"][n, group])
            low *= -int(parts["sub_minima"][n, group]) if weight.has_minima else 0
        zero = int(parts["zeros"][n, group]) if weight.zero is None else weight.zero
        assert matrix[n, k] == scale * (int(codes[n, k]) - zero) + low, (n, k)


@pytest.mark.parametrize("form", FORMS)
def test_codes_row_by_row_give_the_same_bits(form):
    weight = random_weight(form)
    if weight.bits < 8:  # every code of the format occurs
        assert weight.unpacked().unique().numel() == 1 << weight.bits
    again = FORMATS[form].from_codes(weight.unpacked(), torch.float64, **weight.of_groups())
    assert all(map(torch.equal, weight.tensors, again.tensors))


@pytest.mark.parametrize("form", FORMS)
def test_rounding_makes_a_small_error(form):
    matrix = torch.randn(64, COLUMNS, generator=torch.Generator().manual_seed(3))
    weight = FORMATS[form].allocate(64, COLUMNS, torch.float32, lambda shape, dtype: torch.empty(shape, dtype=dtype))
    weight.copy_(matrix)
    error = (weight.dequantise() - matrix).square().mean().sqrt()
    assert error <= ROUNDING_ERRORS[form]
    assert error >= ROUNDING_ERRORS[form] / 2, "the bound says nothing"


def test_int4_takes_the_groups_of_its_zeros():
    codes = torch.randint(0, 16, (16, 192), dtype=torch.uint8)
    for group in (32, 64, 96, 192):
        parts = {
            "scales": torch.rand(16, 192 // group),
            "zeros": torch.randint(0, 16, (16, 192 // group), dtype=torch.uint8),
        }
        weight = FORMATS["int4"].from_codes(codes, torch.float64, **parts)
        assert weight.values_of_group == group
        weight.check("linear", "weight", (16, 192))
        scale, zero = (each.double().repeat_interleave(group, dim=1) for each in parts.values())
        assert torch.equal(weight.dequantise(), scale * (codes.double() - zero))


@pytest.mark.parametrize(
    ("form", "rows", "columns"), [("q4_0", 24, 64), ("q4_k", 16, 128), ("int8", 16, 48), ("q8_0", 16, 0)]
)
def test_a_size_that_the_format_does_not_have(form, rows, columns):
    with pytest.raises(ValueError, match=rf"the format {form} has matrices whose rows .* not \[{rows}, {columns}\]"):
        FORMATS[form].allocate(rows, columns, torch.float32, lambda shape, dtype: torch.empty(shape, dtype=dtype))


def test_a_tensor_that_does_not_fit_the_others_is_named():
    weight = random_weight("q4_k", torch.float32)
    weight.sub_minima = weight.sub_minima[:, 1:]
    with pytest.raises(ValueError, match=r"linear: weight.sub_minima must have shape \[2, 16, 16\]"):
        weight.check("linear", "weight", (ROWS, COLUMNS))
    weight = random_weight("q4_k", torch.float32)
    weight.scales = weight.scales.int()
    with pytest.raises(TypeError, match=r"linear: weight.scales must be int16, and is int32"):
        weight.check("linear", "weight", (ROWS, COLUMNS))


def test_a_stack_is_its_parts_one_below_the_other(ops):
    parts = [random_weight("q4_k", torch.float32, rows=64), random_weight("q6_k", torch.float32, seed=1)]
    stack = joined([parts[0].rows(0, 32), parts[0].rows(32, 64), parts[1]])
    assert isinstance(stack, Stack)
    assert stack.format == "q4_k+q6_k"
    assert len(stack.names) == len(stack.tensors)
    matrix = torch.cat([part.dequantise() for part in parts])
    assert torch.equal(stack.dequantise(), matrix)
    assert torch.equal(as_weight(list(stack.tensors), stack.format).dequantise(), matrix)
    assert torch.equal(stack.rows(16, 80).dequantise(), matrix[16:80])
    assert type(stack.rows(64, 80)) is FORMATS["q6_k"]
    ids = torch.tensor([70, 3, 63, 64])
    assert torch.equal(stack.take(ids), matrix[ids])
    x = torch.randn(3, COLUMNS)
    assert_product_of_planes(ops.linear(x, stack), "linear", x, stack)
    with pytest.raises(ValueError, match="linear: weight"):
        ops.linear(x[:, 1:], stack)
    with pytest.raises(ValueError, match="expected one number of columns"):
        Stack([parts[0], Dense(torch.ones(2, 3))]).check("linear", "weight", ("N", "K"))
