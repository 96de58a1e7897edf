"""Whether a result is right: held against the torch reference in float64 before its time counts."""

from __future__ import annotations

from typing import Any

import torch

from qwenkern.benchmarks.ops.cases import Case, mapped
from qwenkern.benchmarks.ops.providers import Function
from qwenkern.kernels import reference

# The rule of tests/support/tolerances.py: how many times as much as torch in the same dtype a result may err, at most
# and in root mean square, beside two roundings and half a rounding of the largest value.
ERROR_RATIO, RMS_RATIO = 2.0, 1.5


def _copies(inputs: tuple[Any, ...], wide: bool = False) -> tuple[Any, ...]:
    """Fresh tensors, since ops may write into their caches; in float64 if ``wide``."""
    return mapped(lambda each: each.double() if wide and each.is_floating_point() else each.clone(), inputs)


def expected(case: Case, inputs: tuple[Any, ...]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What the twin returns in the dtype of the inputs, and in float64."""
    twin = getattr(reference, case.op)
    return _floats(twin(*_copies(inputs))), _floats(twin(*_copies(inputs, wide=True)))


def check(
    case: Case, function: Function, inputs: tuple[Any, ...], truth: tuple[list[torch.Tensor], list[torch.Tensor]]
) -> None:
    """Raises unless the function errs hardly more than torch does in the same dtype."""
    outs = _floats(function(*_copies(inputs)))
    for index, (out, peer, exact) in enumerate(zip(outs, *truth, strict=True)):
        rounding = torch.finfo(peer.dtype if peer.dtype != torch.float32 else inputs[0].dtype).eps * exact.abs().max()
        ours, theirs = (out - exact).abs(), (peer - exact).abs()
        error, allowed = ours.max(), ERROR_RATIO * theirs.max() + 2 * rounding
        rms, allowed_rms = (each.square().mean().sqrt() for each in (ours, theirs))
        if not (error <= allowed and rms <= RMS_RATIO * allowed_rms + rounding / 2):  # also where one is NaN
            raise ArithmeticError(
                f"result {index} of {case.name} errs by {error:.3g}, {rms:.3g} in root mean square, where at most "
                f"{allowed:.3g} and {RMS_RATIO * allowed_rms + rounding / 2:.3g} are allowed"
            )


def _floats(outs: Any) -> list[torch.Tensor]:
    outs = outs if isinstance(outs, tuple) else (outs,)
    return [out for out in outs if out.is_floating_point()]
