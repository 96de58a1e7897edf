"""Rounds a matrix to the codes and scales of a quantised format (grouped.py). For each group several ranges of codes
are tried, some of which clip the group's largest values. The one with the least squared error is used, and each value
gets the nearest code."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .grouped import Grouped

SHRINK = (1.0, 0.97, 0.94, 0.91, 0.88, 0.85, 0.8, 0.75)  # factors of a group's whole range that are tried
SUB_SCALES, SIGNED_SUB_SCALES = 63, 127  # the largest sub-scale


class Rounded(NamedTuple):
    """Arguments of Grouped.from_codes."""

    codes: Tensor  # [N, K] uint8
    of_groups: dict[str, Tensor]


class Range(NamedTuple):
    """The values that the codes of each group stand for: step * (code - zero) + low. Each is [N, groups, 1]."""

    step: Tensor
    zero: Tensor | int
    low: Tensor | int


def nearest(matrix: Tensor, form: type[Grouped], group: int) -> Rounded:
    """The codes and scales of a matrix [N, K] (float32) in a format with groups of ``group`` values."""
    values = matrix.reshape(len(matrix), -1, group)
    least = values.amin(-1, keepdim=True).clamp_(max=0)
    most = values.amax(-1, keepdim=True).clamp_(min=0)
    if form.zero and not form.has_minima:
        # the value of the largest magnitude gets code 0, because there is one more code below the zero point than above
        width = torch.where(most > -least, most, least) / -form.zero
    else:
        width = (most - least) / (form.levels - 1)
        if form.has_minima and not form.super_scales:
            least = values.amin(-1, keepdim=True)
            width = (values.amax(-1, keepdim=True) - least) / (form.levels - 1)
    step = low = error = None
    for shrink in SHRINK:
        found = _range(form, width * shrink, least * shrink)
        missed = _squared_error(values, form, found)
        if error is None or step is None or low is None:
            step, low, error = found.step, least * shrink, missed
        else:
            better = missed < error
            step = torch.where(better, found.step, step)
            low = torch.where(better, least * shrink, low)
            error = torch.where(better, missed, error)
    assert step is not None
    assert low is not None
    found, of_groups = _stored(form, step, low)
    return Rounded(_codes(values, form, found).to(torch.uint8).view(matrix.shape), of_groups)


def _range(form: type[Grouped], step: Tensor, low: Tensor) -> Range:
    if form.zero is None:  # a zero point for each group
        return Range(step, torch.where(step == 0, 0.0, -low / step).round_().clamp_(0, form.levels - 1), 0)
    return Range(step, form.zero, low if form.has_minima else 0)


def _codes(values: Tensor, form: type[Grouped], found: Range) -> Tensor:
    """The codes as floats, [N, groups, values]."""
    step = torch.where(found.step == 0, torch.inf, found.step)
    return ((values - found.low) / step + found.zero).round_().clamp_(0, form.levels - 1)


def _squared_error(values: Tensor, form: type[Grouped], found: Range) -> Tensor:
    """The squared error of each group, [N, groups, 1]. It is computed for several ranges, so it makes few passes over
    the values."""
    inverse = torch.where(found.step == 0, 0.0, 1 / found.step)
    exact = torch.addcmul(found.zero - found.low * inverse, values, inverse)  # codes before they are rounded
    missed = exact.round().clamp_(0, form.levels - 1).sub_(exact).square_().sum(-1, keepdim=True)
    return torch.where(found.step == 0, (values - found.low).square().sum(-1, keepdim=True), missed * found.step**2)


def _stored(form: type[Grouped], step: Tensor, low: Tensor) -> tuple[Range, dict[str, Tensor]]:
    """The range as the stored numbers give it, and the tensors to store."""
    step, low = step.squeeze(-1), low.squeeze(-1)
    if form.super_scales:
        scales, sub_scales, step = _in_two(step, form, SIGNED_SUB_SCALES if form.signed_sub_scales else SUB_SCALES)
        of_groups = {"scales": scales, "sub_scales": sub_scales}
        if form.has_minima:
            minima, sub_minima, low = _in_two(-low, form, SUB_SCALES)
            of_groups |= {"minima": minima, "sub_minima": sub_minima}
            low = -low
        return _range(form, step[..., None], low[..., None]), of_groups
    scales = step.half()
    of_groups, step = {"scales": scales}, scales.float()
    if form.has_minima:
        of_groups["minima"] = low.half()
        low = of_groups["minima"].float()
    found = _range(form, step[..., None], low[..., None])
    if isinstance(found.zero, Tensor):
        of_groups["zeros"] = found.zero.squeeze(-1).to(torch.uint8)
    return found, of_groups


def _in_two(values: Tensor, form: type[Grouped], most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values [N, groups] as products of a float16 for each SUPER values of k and a small integer for each group: the
    floats, the integers, and the products."""
    assert form.group is not None
    each = values.unflatten(1, (-1, 256 // form.group))
    scales = (each.abs().amax(-1, keepdim=True) / most).half()
    wide = scales.float()
    small = torch.where(wide == 0, 0.0, each / wide).round_().clamp_(-most if form.signed_sub_scales else 0, most)
    return scales.squeeze(-1), small.flatten(1).to(torch.int16), (small * wide).flatten(1)
