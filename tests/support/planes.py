"""Products with quantised weights on a CPU, for which x is converted to planes of int8: checks of their errors."""

from __future__ import annotations

from typing import Any

import torch
from support.references import mapped
from support.tolerances import assert_within_planes, plane_errors
from torch import Tensor

from qwenkern.kernels import Weight, reference
from qwenkern.kernels.rms_norm import normed


def assert_product_of_planes(out: Tensor, name: str, *args: Any, planes: int = 2) -> None:
    """``out`` is the result of linear, norm_linear, norm_swiglu_linear or lm_head for these arguments. float32 results
    must be as exact as the planes are."""
    exact = [mapped(lambda each: each.double() if each.is_floating_point() else each, arg) for arg in args]
    truth = getattr(reference, name)(*exact)
    weight = next(arg for arg in exact if isinstance(arg, Weight)).dequantise()
    x = exact[0] if name == "linear" else normed(*exact[:3])
    worst, expected = plane_errors(x, weight, planes)
    if name == "norm_swiglu_linear":
        worst, expected = _gated(x @ weight.T, worst), _gated(x @ weight.T, expected)
    assert_within_planes(out, truth, worst, expected)


def _gated(product: Tensor, error: Tensor) -> Tensor:
    """The error of silu(gate) * up, from those of gate and up. silu's slope is at most 1.1."""
    (gate, up), (of_gate, of_up) = product.chunk(2, dim=-1), error.chunk(2, dim=-1)
    return 1.1 * of_gate * (up.abs() + of_up) + torch.nn.functional.silu(gate).abs() * of_up
