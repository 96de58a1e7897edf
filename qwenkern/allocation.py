"""Memory for weights."""

from __future__ import annotations

import contextlib
import math
import mmap

import torch
from torch import Tensor

from .errors import RequestError

HUGE_PAGE = 2 << 20


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor whose values are undefined. Raises RequestError where the device gives no memory for it."""
    try:
        return _empty(shape, dtype, device)
    except (OSError, OverflowError, RuntimeError) as error:  # what mmap and torch say where there is no memory
        reason = str(error).partition("\n")[0]
        raise RequestError(
            f"device {device} gives no memory for weights of shape {list(shape)} in {dtype}: {reason}"
        ) from error


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On a CPU large tensors lie in huge pages where the system has them, because a processor that streams weights
    fetches further ahead in those."""
    size = math.prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or size < 2 * HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE_PAGE
    return whole[start : start + size].view(dtype).view(shape)
