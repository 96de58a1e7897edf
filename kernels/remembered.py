"""Remembers which implementation runs an op on a GPU for arguments of one kind. The checks and the choice of a backend
read only shapes, strides, dtypes, devices and numbers there, so they find the same for equal ones.

All layers of a forward pass have arguments of the same kind, so only the first layer is checked: the checks take up to
20 us, the look-up 5 us. On a CPU the checks also read the values of tensors, and nothing is remembered."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from .dispatch import Implementation
from .environment import KERNELS
from .pages import Pages
from .weights import Weight

MOST = 4096  # the lengths of prompts are part of the keys

REMEMBERED: dict[Any, Implementation] = {}


def remember(key: tuple[Any, ...], implementation: Implementation) -> None:
    if len(REMEMBERED) >= MOST:
        REMEMBERED.clear()
    REMEMBERED[key] = implementation


def signature(name: str, args: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, ...] | None:
    """All that the checks of an op and the choice of a backend depend on; None if they also read values of tensors."""
    key: list[Any] = [name, KERNELS.get()]
    try:
        if not _append(args, key):
            return None
        if keywords:
            key += keywords
            if not _append(keywords.values(), key):
                return None
    except RuntimeError:  # from torch, for a layout without sizes or strides; the checks say what is wrong
        return None
    return tuple(key)


def _append(given: Iterable[Any], key: list[Any]) -> bool:
    for each in given:
        kind = type(each)
        if kind is Tensor or kind is Parameter:
            if each.is_cpu:
                return False
            key += (each.shape, each.stride(), each.dtype, each.device)
        elif each is None:
            key.append(None)
        elif kind is float or kind is int or kind is bool:
            key += (kind, each)  # 1, 1.0 and True are equal
        elif isinstance(each, (Weight, Pages)):
            key.append(kind)
            if not _append(each.tensors, key):
                return False
        else:
            return False
    return True
