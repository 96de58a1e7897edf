"""The fp8 format: which numbers its codes are, and how far rounding moves a weight."""

from __future__ import annotations

import pytest
import torch
from support.references import random
from support.tolerances import FP8_RELATIVE

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
