"""What the public functions demand of their arguments. Everything here raises; nothing here touches a GPU's memory.

Values on a GPU (lengths, page numbers, slots, positions) cannot be looked at without waiting for it, so they are
checked on a CPU only: there a wrong one raises, on a GPU it is the caller's promise. Nor are they looked at while a
tape is recorded (c/): they come later.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import c as c_backend

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int32, torch.int64)
FEW = 64  # numbers that Python compares sooner than torch


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
                    fits, empty = fits and not isinstance(want, int), empty or not found[at]
                at += 1
        if not fits:
            raise ValueError(f"{op}: {name} must have shape {_text(shape)}, and has {_text(tensor.shape)}")
        if empty:
            raise ValueError(f"{op}: {name} is empty, with shape {_text(tensor.shape)}")
        if tensor.dtype not in dtypes if like is None else tensor.dtype != like.dtype:
            allowed = dtypes if like is None else (like.dtype,)
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
            raise TypeError(f"{op}: {name} must be {names}, and is {str(tensor.dtype).removeprefix('torch.')}")
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


def check_device(op: str, **tensors: Tensor | None) -> None:
    """Raises unless all tensors are on one device."""
    first = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if first is None:
            first, device = name, tensor.device
        elif tensor.device != device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, and {first} on {device}")


def can_look_at(values: Tensor) -> bool:
    return values.device.type == "cpu" and not c_backend.is_recording()


def check_range(op: str, name: str, values: Tensor, low: int, high: int) -> None:
    """Raises if a value that can be looked at is not within low .. high - 1."""
    if not can_look_at(values) or not values.numel():
        return
    if values.numel() <= FEW:
        numbers = values.flatten().tolist()
        least, most = min(numbers), max(numbers)
    else:
        least, most = (int(value) for value in values.aminmax())
    if least < low or most >= high:
        wrong = least if least < low else most
        raise ValueError(f"{op}: {name} must be within {low} and {high - 1}, and one is {wrong}")


def check_cache(op: str, k_pages: Tensor, v_pages: Tensor, like: Tensor, head_dim: int | str = "D") -> None:
    """Raises unless both are [num_pages, page_size, Hkv, D] in the dtype of ``like``, with this D, or any."""
    check_tensor(op, "k_pages", k_pages, ("pages", "page size", "Hkv", head_dim), like=like, dense=True)
    check_tensor(op, "v_pages", v_pages, tuple(k_pages.shape), like=like, dense=True)


def check_paged(op: str, q: Tensor, k_pages: Tensor, v_pages: Tensor, block_tables: Tensor, lengths: Tensor) -> None:
    """Raises unless these are the arguments of an attention over a paged cache."""
    check_tensor(op, "q", q, ("tokens", "Hq", "D"))
    check_cache(op, k_pages, v_pages, like=q, head_dim=q.shape[-1])
    check_tensor(op, "lengths", lengths, ("S",), dtypes=INTEGERS)
    check_tensor(op, "block_tables", block_tables, (len(lengths), "pages"), dtypes=INTEGERS)
    check_device(op, q=q, k_pages=k_pages, v_pages=v_pages, block_tables=block_tables, lengths=lengths)
    num_pages, page_size, num_kv_heads, _ = k_pages.shape
    if q.shape[1] % num_kv_heads:
        raise ValueError(f"{op}: q's {q.shape[1]} heads must be a multiple of the cache's {num_kv_heads}")
    check_range(op, "lengths", lengths, 1, block_tables.shape[1] * page_size + 1)
    if can_look_at(lengths):
        pages = torch.arange(block_tables.shape[1], device=lengths.device) * page_size
        check_range(op, "block_tables", block_tables[pages < lengths[:, None]], 0, num_pages)


def _layout(tensor: Tensor) -> str:
    return "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")


def _text(sizes: Sequence[int | str]) -> str:
    return "[" + ", ".join(str(size) for size in sizes) + "]"
