"""Counters for programs that divide a sum: the last one to arrive adds up the parts. A counter is zero before and after
each kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import kept_tensors
from .launching import next_power_of_2


def arrivals(x: Tensor, count: int) -> Tensor:
    """At least ``count`` counters [int32] on the device of x.

    A captured step keeps its counters, and its kernels use them in turn (dispatch.dependent_launches). Any other call
    gets its own: they may lie in somebody else's memory pool, which gives the memory to others after the call
    (torch.compile's CUDA graphs do so, also in their warm-up run)."""
    kept = kept_tensors()
    if kept is None:
        return x.new_zeros(count, dtype=torch.int32)
    key = "arrivals", x.device, next_power_of_2(max(count, 1024))
    if key not in kept:
        kept[key] = x.new_zeros(key[2], dtype=torch.int32)
    return kept[key]
