"""The bytes that one program of a kernel moves between the L2 cache and its multiprocessor, counted on the PTX.

    traffic("sm_90", lambda: kernels.linear(x, weight))  # of meta tensors, without memory for their elements

An instruction of a warp moves the sectors of 32 bytes that its lanes touch, each once. The L1 cache is not modelled:
two instructions that touch one sector count twice. On a GPU, loads through L1 may move fewer bytes; cp.async and bulk
copies, which bypass it, do not."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any
from unittest import mock

import numpy as np
from torch.utils._python_dispatch import _disable_current_modes
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from qwenkern.benchmarks.offline import machine_code
from qwenkern.kernels.triton import tuning
from qwenkern.kernels.triton.offline import active

from .arguments import Storages, parameters
from .launch import Grid, Kernel, Launch
from .values import Array

SECTOR, LINE = 32, 128  # bytes
KINDS = {"load": "loaded", "copy": "loaded", "bulk load": "loaded", "store": "stored", "bulk store": "stored"}


@dataclass
class Traffic:
    """Bytes by the name of the argument that they belong to. A prefetch counts lines of 128 bytes, which is other
    traffic: from memory to L2."""

    kernel: str
    grid: Grid
    place: Grid  # of the program
    loaded: dict[str, int] = field(default_factory=dict)
    stored: dict[str, int] = field(default_factory=dict)
    atomic: dict[str, int] = field(default_factory=dict)
    prefetched: dict[str, int] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """The bytes of all loads and stores of the program."""
        return sum(self.loaded.values()) + sum(self.stored.values()) + sum(self.atomic.values())

    @property
    def programs(self) -> int:
        return math.prod(self.grid)


class _Counter:
    def __init__(self, traffic: Traffic, storages: Storages) -> None:
        self._traffic, self._storages = traffic, storages

    def access(self, how: str, offsets: Array, size: int, early: bool) -> None:
        if not len(offsets):
            return
        unit = LINE if how == "prefetch" else SECTOR
        buffer = int(np.searchsorted(self._storages.memory.starts, offsets[0], "right")) - 1
        names = self._storages.names
        name = names[buffer] if buffer < len(names) else "scratch"
        counted: dict[str, int] = getattr(self._traffic, KINDS.get(how, "prefetched" if how == "prefetch" else how))
        counted[name] = counted.get(name, 0) + unit * len(np.unique(offsets // unit))


def traffic(
    key: str,
    call: Callable[[], Any],
    place: Callable[[Grid], Grid] = lambda grid: (0, 0, 0),
    fill: Mapping[str, float] | None = None,
) -> list[Traffic]:
    """The traffic of the program at ``place(grid)`` on ``DEVICES[key]``, for each kernel that ``call`` starts.

    The tensors of ``call`` are meta tensors. Their elements are zeros, or the value that ``fill`` has for the name of
    the argument: ``{"lengths_ptr": 1024}``. Other programs do not run, so the work of the program that arrives last is
    missing. Raises Fault for an error of the program, and Unknown for an instruction that the runner lacks. The process
    must run without TRITON_INTERPRET."""
    found: list[Traffic] = []
    this, compile_ = machine_code.DEVICES[key], JITFunction.run

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> CompiledKernel:
        with _disable_current_modes():
            compiled = compile_(self, *args, grid=grid, warmup=True, **keywords)
            kernel, places = Kernel(compiled.asm["ptx"]), (*grid, 1, 1)[:3]
            given = parameters(compiled, dict(zip(self.arg_names, args, strict=False)) | keywords)
            storages = Storages(given, compiled.metadata.global_scratch_size * math.prod(places), fill)
            arguments = storages.bits(given, list(kernel.program.parameters))
            shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
            counted = Traffic(self.__name__, places, place(places))
            storages.memory.observers.append(_Counter(counted, storages))
            Launch(kernel, places, arguments, storages.memory, shared, warps).run_one(counted.place, Random(0))
        found.append(counted)
        return compiled

    with tuning.offline(this), active(this), mock.patch.object(JITFunction, "run", run):
        call()
    return found
