"""Counters for programs that divide a sum: the last one to arrive adds up the parts. A counter is zero before and after
each kernel."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

_counters: dict[tuple[torch.device, int, int], Tensor] = {}


def arrivals(x: Tensor, count: int) -> Tensor:
    """At least ``count`` counters [int32] on the device of x. Kernels of one stream use the same counters in turn."""
    device = x.device
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = (device, stream, triton.next_power_of_2(max(count, 1024)))
    if key in _counters:
        return _counters[key]
    zeros = torch.zeros(key[2], dtype=torch.int32, device=device)
    if stream and torch.cuda.is_current_stream_capturing():
        return zeros  # for this graph only, which fills them with zeros at each replay
    return _counters.setdefault(key, zeros)
