"""Counters for programs that compute parts of one sum: the last program to finish adds up the parts. A counter is zero
before and after each kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import kept_tensors
from .launching import next_power_of_2


def arrivals(x: Tensor, count: int) -> Tensor:
    """At least ``count`` counters [int32] on the device of x.

    A captured step keeps its counters, and its kernels use them one after another (dispatch.dependent_launches). Any
    other call allocates its own: the memory may come from another library's pool, which reuses it after the call
    (torch.compile's CUDA graphs do so, also in their warm-up run)."""
    kept = kept_tensors()
    if kept is None:
        return x.new_zeros(count, dtype=torch.int32)
    key = "arrivals", x.device, next_power_of_2(max(count, 1024))
    if key not in kept:
        kept[key] = x.new_zeros(key[2], dtype=torch.int32)
    return kept[key]
