"""The fp8 format: the numbers of its codes, and the rounding errors of weights."""

from __future__ import annotations

import pytest
import torch
from support.mutations import Mutation
from support.references import assert_matches_reference, own, random
from support.tolerances import FP8_RELATIVE

from qwenkern.kernels.dispatch import refusals
from qwenkern.kernels.weights.fp8 import LARGEST, Fp8


def e4m3(code: int) -> float:
    """A finite code's number, from the format's definition: sign, four exponent bits (bias 7), three mantissa bits."""
    sign, exponent, mantissa = -1.0 if code & 128 else 1.0, code >> 3 & 15, code & 7
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


CODES = [code for code in range(256) if code & 127 != 127]  # 127 and 255 are NaN


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_every_code_is_its_number(dtype):
    codes = torch.tensor([CODES, CODES[::-1]], dtype=torch.uint8)
    scales = torch.tensor([1.0, 2.0**-5])
    weight = Fp8.from_codes(codes.view(torch.float8_e4m3fn), scales, dtype)
    values = torch.tensor([e4m3(code) for code in CODES], dtype=torch.float64)
    expected = torch.stack((values, values.flip(0) * 2.0**-5))
    assert weight.dtype == dtype
    assert torch.equal(weight.dequantise().double(), expected)
    assert torch.equal(weight.take(torch.tensor([1, 0, 1])).double(), expected[[1, 0, 1]])
    assert torch.equal(weight.rows(1, 2).dequantise().double(), expected[1:])


def test_a_row_is_rounded_to_the_nearest_codes():
    """With any scale: no other code of the row would be nearer to the value."""
    matrix = random(5, 300, dtype=torch.float32, device=torch.device("cpu"), seed=3)
    matrix[2] *= 1e-6
    matrix[3] = 0
    matrix[4] *= 1e6
    weight = Fp8.allocate(5, 300, torch.float64, lambda shape, dtype: torch.zeros(shape, dtype=dtype))
    weight.copy_(matrix)
    scales = weight.scales.view(torch.float32).double()
    reach = [row for row in range(5) if row != 3]
    assert torch.allclose(scales[reach] * LARGEST, matrix.double().abs().amax(1)[reach], rtol=FP8_RELATIVE, atol=0)
    possible = torch.tensor([e4m3(code) for code in CODES], dtype=torch.float64) * scales[:, None]
    nearest = (matrix.double()[:, :, None] - possible[:, None]).abs().amin(2)
    error = (weight.dequantise() - matrix.double()).abs()
    # scales and quotients are rounded to float32, which may tip a value halfway between two codes
    assert (error <= nearest + FP8_RELATIVE * matrix.double().abs()).all()
    assert not weight.dequantise()[3].any()


def test_a_view_of_rows_is_written_in_place():
    weight = Fp8.allocate(6, 40, torch.float32, lambda shape, dtype: torch.zeros(shape, dtype=dtype))
    weight.rows(2, 5).copy_(torch.full((3, 40), 7.0))
    assert torch.equal(weight.dequantise().nonzero()[:, 0].unique(), torch.tensor([2, 3, 4]))
    assert torch.equal(weight.dequantise()[2:5], torch.full((3, 40), 7.0))


def of_bits(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Fp8:
    """Any numbers, subnormal ones among them, and scales that differ."""
    codes = torch.tensor(CODES, dtype=torch.uint8)[torch.arange(rows * columns) * 7919 % len(CODES)]
    codes = codes.view(rows, columns).to(device).view(torch.float8_e4m3fn)
    return Fp8.from_codes(codes, torch.logspace(-3, -2, rows, device=device), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(37, 20), (64, 252), (17, 1040)])
def test_products_of_any_size(ops, device, rows, columns, dtype):
    """Rows that are no multiple of a tile, and columns that are none of a block."""
    weight = of_bits(rows, columns, dtype, device)
    x = random(3, columns, dtype=dtype, device=device, seed=2)
    assert_matches_reference(ops, "linear", x, weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_product_has_every_number_as_it_is(ops, device, dtype):
    """With the identity for x, the products are the weight: exact, as its numbers are in bfloat16."""
    places = (torch.arange(len(CODES))[:, None] + 77 * torch.arange(16)) % len(CODES)
    codes = torch.tensor(CODES, dtype=torch.uint8)[places].to(device)
    weight = own(ops, Fp8.from_codes(codes.view(torch.float8_e4m3fn), torch.ones(len(CODES), device=device), dtype))
    x = torch.eye(16, dtype=dtype, device=device)
    expected = torch.tensor([e4m3(code) for code in CODES], dtype=torch.float64)[places].T.to(device)
    assert torch.equal(ops.linear(x, weight).double(), expected)


def test_rows_that_are_not_whole_words(ops, device):
    """Four codes are loaded as one word. Other rows are dequantised by torch."""
    weight = of_bits(32, 250, torch.bfloat16, device)
    x = random(3, 250, dtype=torch.bfloat16, device=device, seed=2)
    assert "rows are not whole words of four codes" in refusals("linear", x, x, weight)["triton"]
    assert_matches_reference(ops, "linear", x, weight)
    assert_matches_reference(ops, "linear", x[:, :40], of_bits(32, 40, x.dtype, device))


MUTATIONS = [
    Mutation(
        "the signs of even bytes lost",
        "weights/fp8_products.py",
        "signs << 8)",
        "signs)",
        test_a_product_has_every_number_as_it_is,
        {"dtype": torch.bfloat16},
    ),
    Mutation(
        "numbers of bfloat16 not scaled",
        "weights/fp8_products.py",
        "even = scaled_bf16x2(masked_else(words << 4, 0x07F007F0, signs << 8), 0x7B807B80)",
        "even = masked_else(words << 4, 0x07F007F0, signs << 8)",
        test_a_product_has_every_number_as_it_is,
        {"dtype": torch.bfloat16},
    ),
    Mutation(
        "x in another order than the codes",
        "weights/fp8_products.py",
        "tl.permute(x, [0, 2, 4, 3, 1])",
        "tl.permute(x, [0, 2, 3, 4, 1])",
        test_products_of_any_size,
        {"rows": 37, "columns": 20, "dtype": torch.float32},
    ),
    Mutation(
        "one scale for all rows",
        "weights/fp8_products.py",
        "* groups[None, :, None]",
        "* tl.max(groups, axis=0)",
        test_products_of_any_size,
        {"rows": 37, "columns": 20, "dtype": torch.float32},
    ),
]
