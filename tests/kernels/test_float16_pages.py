"""The bits that float16 pages store, against numpy's float16. test_pages.py has the tests of all formats."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support.mutations import Mutation
from support.references import random
from support.tolerances import FLOAT16_RELATIVE

from qwenkern.kernels import Pages, reference
from qwenkern.kernels.pages import FORMATS

DIM = 64
ODD = [65504.0, -65504.0, 65519.0, 65520.0, 1e30, -1e30, math.inf, -math.inf, math.nan, 2.0**-24, 2.0**-25, 3e-8, 6e-5]


def stored(ops, device: torch.device, dtype: torch.dtype, values: torch.Tensor) -> Pages:
    """Pages whose slots 0 .. T have these values [T, DIM] as v, written by the op."""
    pages = FORMATS["float16"].allocate(1, 64, 1, DIM, dtype, device)
    pages.store(torch.arange(64, device=device), *(torch.zeros(64, 1, DIM, dtype=dtype, device=device),) * 2)
    tokens = len(values)
    qkv = torch.cat((random(tokens, 2 * DIM, dtype=dtype, device=device), values.to(device, dtype)), 1)
    places = torch.arange(tokens, device=device)
    ops.rope_and_cache(qkv, places, torch.rand(64, DIM, device=device), own(ops, pages), places)
    return pages


def own(ops, pages: Pages) -> Pages:
    return ops.pages.FORMATS["float16"](*pages.tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["kernels", "reference"])
def test_the_bits_are_those_of_numpy(ops, device, name, dtype):
    """To nearest even; finite values that are too large become the largest, infinities and NaN stay."""
    values = random(20, DIM, dtype=dtype, device=torch.device("cpu"), scale=20.0)
    values[0, : len(ODD)] = torch.tensor(ODD)
    values[1] = values[1] * 2.0**-20  # subnormal
    pages = stored(ops if name == "kernels" else reference_ops(ops), device, dtype, values)
    wide = values.float().numpy()
    expected = np.where(np.isfinite(wide), np.clip(wide, -65504, 65504), wide).astype(np.float16)
    found = pages.v[0, :20, 0].cpu().numpy().view(np.float16)
    assert np.array_equal(found, expected, equal_nan=True)
    _, v = pages.gather(torch.tensor([0], device=device), 20)
    assert v.dtype == dtype
    assert torch.equal(v[0].nan_to_num(7.0), torch.from_numpy(expected).to(device, dtype).nan_to_num(7.0))
    usual = torch.isfinite(values) & (values.abs() > 2.0**-14) & (values.abs() < 65520)
    errors = (torch.from_numpy(expected).double() - values.double()).abs()
    assert (errors[usual] <= FLOAT16_RELATIVE * values.double().abs()[usual]).all()


def reference_ops(ops):
    """An object with the op of the reference and the formats of the ops."""
    return type("Reference", (), {"rope_and_cache": staticmethod(reference.rope_and_cache), "pages": ops.pages})


_BITS = {"name": "kernels", "dtype": torch.float32}
MUTATIONS = [
    Mutation(
        "too large becomes infinite", "pages/float16.py", "(size > _BITS_OF_LARGEST)",
        "(size > 0x7F000000)", test_the_bits_are_those_of_numpy, _BITS,
    ),
    Mutation(
        "infinity becomes the largest", "pages/float16.py", " & (size < _BITS_OF_INFINITY)", "",
        test_the_bits_are_those_of_numpy, _BITS,
    ),
    Mutation(
        "the sign of too large values", "pages/float16.py", "(bits & -0x80000000) | ", "0 * bits + ",
        test_the_bits_are_those_of_numpy, _BITS,
    ),
]  # fmt: skip
