"""Checks of the arguments of public functions. Each check raises ValueError or TypeError, and none copies from a GPU.

Reading a value on a GPU (a length, a page number, a slot, a position) would wait for the GPU. So values are checked on
a CPU only; on a GPU the caller must pass valid ones. Values are also not checked while C calls are recorded (c/),
because the tensors get their values when the calls are replayed.
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
SMALL = 64  # for up to 64 numbers, Python finds the range faster than torch


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
    """Raises ValueError or TypeError unless ``tensor`` has this shape, one of these dtypes, and contiguous rows.

    A string in the shape stands for any size of at least 1. "..." at the front stands for any number of leading
    dimensions, which may be empty. With ``like`` the dtype must be that of ``like``. With ``dense`` the whole tensor
    must be contiguous, not only its last dimension."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, and is {type(tensor).__name__}")
    try:
        found, leading = tensor.shape, shape[0] == "..."
        at = len(found) - len(shape) + leading
        fits, empty = at >= 0 if leading else at == 0, False
        if fits:  # a plain loop is fastest: an op of a few microseconds calls this several times
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
        if tensor.stride(-1) != 1 or tensor.is_mkldnn:
            if tensor.layout is not torch.strided:
                raise RuntimeError
            if found[-1] != 1:
                stride = tensor.stride(-1)
                raise ValueError(f"{op}: {name}'s last dimension must be contiguous, and its stride is {stride}")
    except RuntimeError:  # also raised by torch where a layout has no sizes or strides
        raise TypeError(f"{op}: {name} must be a dense tensor, and is {_layout(tensor)}") from None


def check_device(op: str, **tensors: Any) -> None:
    """Raises ValueError unless all tensors, weights and pages are on one device. An argument that is None is
    skipped."""
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
    """Whether the host can read the values now: not on a GPU, not from torch's fake tensors, not while C calls are
    recorded."""
    return values.device.type == "cpu" and type(values) is not FakeTensor and not is_recording()


def check_range(op: str, name: str, values: Tensor, low: int, high: int) -> None:
    """Raises ValueError if a value that the host can read is not within low .. high - 1."""
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
    """x in float32; x itself if it is float64."""
    return x if x.dtype == torch.float64 else x.float()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _layout(tensor: Tensor) -> str:
    return "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")


def _text(sizes: Sequence[int | str]) -> str:
    return "[" + ", ".join(str(size) for size in sizes) + "]"
