"""What the public functions demand of their arguments. Everything here raises; nothing here touches a GPU's memory.

Values on a GPU (lengths, page numbers, slots, positions) cannot be looked at without waiting for it, so they are
checked on a CPU only: there a wrong one raises, on a GPU it is the caller's promise. Nor are they looked at while
calls of C are recorded (c/): they come later.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .recording import is_recording

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int32, torch.int64)
SMALL = 64  # so many numbers Python compares sooner than torch


def check_tensor(
    op: str,
    name: str,
    tensor: Tensor,
    shape: Sequence[int | str],
    *,
    like: Tensor | None = None,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
    dense: bool = False,
) -> None:
    """Raises unless ``tensor`` has this shape, dtype and device. A word in the shape stands for any size of at least 1,
    "..." in front for any leading dimensions, empty ones too. Its last dimension must be contiguous, or with ``dense``
    all of it."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, and is {type(tensor).__name__}")
    try:
        found, leading = tensor.shape, shape[0] == "..."
        at = len(found) - len(shape) + leading
        fits, empty = at >= 0 if leading else at == 0, False
        if fits:  # a loop by hand: this is called several times for an op that takes microseconds
            for want in shape[1:] if leading else shape:
                if want != found[at]:
                    fits, empty = fits and isinstance(want, str), empty or not found[at]
                at += 1
        if not fits:
            raise ValueError(f"{op}: {name} must have shape {_text(shape)}, and has {_text(tensor.shape)}")
        if empty:
            raise ValueError(f"{op}: {name} is empty, with shape {_text(tensor.shape)}")
        if tensor.dtype not in dtypes if like is None else tensor.dtype != like.dtype:
            allowed = dtypes if like is None else (like.dtype,)
            raise TypeError(f"{op}: {name} must be {' or '.join(map(_name, allowed))}, and is {_name(tensor.dtype)}")
        if dense and not tensor.is_contiguous():
            raise ValueError(f"{op}: {name} must be contiguous, and has strides {_text(tensor.stride())}")
        if tensor.stride(-1) != 1:
            if tensor.layout is not torch.strided:
                raise RuntimeError
            if found[-1] != 1:
                stride = tensor.stride(-1)
                raise ValueError(f"{op}: {name}'s last dimension must be contiguous, and its stride is {stride}")
    except RuntimeError:  # or torch's, where a layout has no sizes or strides
        raise TypeError(f"{op}: {name} must be a dense tensor, and is {_layout(tensor)}") from None


def check_device(op: str, **tensors: Any) -> None:
    """Raises unless all tensors, weights and pages are on one device. None stands for no tensor."""
    first = None
    for name, value in tensors.items():
        if value is None:
            continue
        if first is None:
            first, device = name, value.device
        elif value.device != device:
            name = name if name != "pages" else value.names[0]
            raise ValueError(f"{op}: {name} is on {value.device}, and {first} on {device}")


def can_look_at(values: Tensor) -> bool:
    """Whether values are there to be read: not on a GPU, on torch's fake tensors, or while calls are recorded."""
    return values.device.type == "cpu" and type(values) is not FakeTensor and not is_recording()


def check_range(op: str, name: str, values: Tensor, low: int, high: int) -> None:
    """Raises if a value that can be looked at is not within low .. high - 1."""
    if not can_look_at(values) or not values.numel():
        return
    if values.numel() <= SMALL:
        numbers = values.flatten().tolist()
        least, most = min(numbers), max(numbers)
    else:
        least, most = (int(value) for value in values.aminmax())
    if least < low or most >= high:
        wrong = least if least < low else most
        raise ValueError(f"{op}: {name} must be within {low} and {high - 1}, and one is {wrong}")


def wide(x: Tensor) -> Tensor:
    """x in float32, or in float64 where it is."""
    return x if x.dtype == torch.float64 else x.float()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _layout(tensor: Tensor) -> str:
    return "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")


def _text(sizes: Sequence[int | str]) -> str:
    return "[" + ", ".join(str(size) for size in sizes) + "]"
