"""Converts weights, of each format, to the fields of the struct ``weight`` in calls.h, in order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..weights import Dense, Grouped, Weight
from .calls import LAYOUT

WeightStruct = tuple[Any, ...]  # tensors or None for pointers, and numbers
DENSE, GROUPED = LAYOUT.lists["WEIGHT_FORMAT"], LAYOUT.lists["GROUPED_FORMAT"]
_NUMBERS = {name: number for number, name in enumerate((*DENSE, *GROUPED))}
_NOTHING = (None, None, None, None, None, None, 0, 0)
NO_WEIGHT: WeightStruct = (None, 0, 0, *_NOTHING)


def _dense(weight: Dense) -> WeightStruct:
    return weight.tensor, weight.tensor.element_size() * weight.tensor.stride(0), _NUMBERS["dense"], *_NOTHING


def _grouped(weight: Grouped) -> WeightStruct:
    group = weight.shape[1] // weight.scales.shape[1]
    beside = weight.high, weight.scales, weight.minima, weight.sub_scales, weight.sub_minima, weight.zeros
    return weight.codes, 0, _NUMBERS[weight.format], *beside, group, weight.scales.dtype == torch.int32


STRUCTS: dict[str, Callable[..., WeightStruct]] = {"dense": _dense} | dict.fromkeys(GROUPED, _grouped)


def refuses_weight(weight: Weight) -> str | None:
    if weight.format not in STRUCTS:
        return f"weights of the format {weight.format} (C has {', '.join(STRUCTS)})"
    return None


def weight_struct(weight: Weight) -> WeightStruct:
    return STRUCTS[weight.format](weight)
