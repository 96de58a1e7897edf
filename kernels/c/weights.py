"""Converts weights, of each format, to the fields of the struct ``weight`` in calls.h, in order."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..weights import Dense, Weight
from .calls import LAYOUT

WeightStruct = tuple["Tensor | None", int, int]
_NUMBERS = {name: number for number, name in enumerate(LAYOUT.lists["WEIGHT_FORMAT"])}
NO_WEIGHT: WeightStruct = (None, 0, 0)


def _dense(weight: Dense) -> WeightStruct:
    return weight.tensor, weight.tensor.element_size() * weight.tensor.stride(0), _NUMBERS["dense"]


STRUCTS: dict[str, Callable[..., WeightStruct]] = {"dense": _dense}


def refuses_weight(weight: Weight) -> str | None:
    if weight.format not in STRUCTS:
        return f"weights of the format {weight.format} (C has {', '.join(STRUCTS)})"
    return None


def weight_struct(weight: Weight) -> WeightStruct:
    return STRUCTS[weight.format](weight)
