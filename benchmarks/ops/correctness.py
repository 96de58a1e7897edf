"""Checks a result before its time counts: compares it with the torch reference in float64."""

from __future__ import annotations

from typing import Any

import torch

from qwenkern.benchmarks.ops.cases import Case, mapped
from qwenkern.benchmarks.ops.providers import Function
from qwenkern.kernels import reference

# The rule of tests/support/tolerances.py. The largest error may be ERROR_RATIO times that of torch in the same dtype,
# plus two roundings of the largest value. The root mean square may be RMS_RATIO times torch's, plus half a rounding.
ERROR_RATIO, RMS_RATIO = 2.0, 1.5


def _copies(inputs: tuple[Any, ...], wide: bool = False) -> tuple[Any, ...]:
    """Copies of the tensors, because ops may write into the caches; in float64 if ``wide``."""
    return mapped(lambda each: each.double() if wide and each.is_floating_point() else each.clone(), inputs)


def expected(case: Case, inputs: tuple[Any, ...]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The results of the reference in the dtype of the inputs, and in float64."""
    function = getattr(reference, case.op)
    return _floats(function(*_copies(inputs))), _floats(function(*_copies(inputs, wide=True)))


def check(
    case: Case, function: Function, inputs: tuple[Any, ...], truth: tuple[list[torch.Tensor], list[torch.Tensor]]
) -> None:
    """Raises ArithmeticError if the error of the function is larger than ERROR_RATIO and RMS_RATIO allow."""
    outs = _floats(function(*_copies(inputs)))
    for index, (out, peer, exact) in enumerate(zip(outs, *truth, strict=True)):
        rounding = torch.finfo(peer.dtype if peer.dtype != torch.float32 else inputs[0].dtype).eps * exact.abs().max()
        ours, theirs = (out - exact).abs(), (peer - exact).abs()
        error, allowed = ours.max(), ERROR_RATIO * theirs.max() + 2 * rounding
        rms, allowed_rms = (each.square().mean().sqrt() for each in (ours, theirs))
        if not (error <= allowed and rms <= RMS_RATIO * allowed_rms + rounding / 2):  # also if one is NaN
            raise ArithmeticError(
                f"result {index} of {case.name}: the error is {error:.3g} (RMS {rms:.3g}); expected at most "
                f"{allowed:.3g} (RMS {RMS_RATIO * allowed_rms + rounding / 2:.3g})"
            )


def _floats(outs: Any) -> list[torch.Tensor]:
    outs = outs if isinstance(outs, tuple) else (outs,)
    return [out for out in outs if out.is_floating_point()]
