"""Counts the bytes that a launch loads from global memory, and its instructions before the first matrix product, by
running a few of its CTAs on the PTX runner.

Data that every CTA reads again, such as the tokens of a few-token linear, come from the L2 cache. On an H100 its
bandwidth is less than twice that of the memory. So bytes that the roofline does not count may limit a kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any
from unittest import mock

import numpy as np
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from qwenkern.benchmarks.offline.ptx.arguments import Storages, parameters
from qwenkern.benchmarks.offline.ptx.launch import Cta, Kernel, Launch
from qwenkern.benchmarks.offline.ptx.values import Array
from qwenkern.benchmarks.offline.ptx.warp import Step, Stop, Warp
from qwenkern.kernels.triton import tuning
from qwenkern.kernels.triton.offline import active

SECTOR = 32  # the fewest bytes that the L2 cache moves
LINE = 128  # bytes that a prefetch moves
SAMPLES = 3  # CTAs that are run: the first, the middle one and the last


@dataclass(frozen=True)
class Traffic:
    """The traffic of all CTAs of a launch, in bytes."""

    kernel: str
    loaded: int  # from global memory, through the L2 cache; bytes that a warp loads in one instruction count once
    early: int  # the part of ``loaded`` and of prefetches that is requested before griddepcontrol.wait
    prologue: int  # a warp's instructions from that wait to its first matrix product; all, if it has no product


class _Prologue:
    """Counts the instructions of each warp from griddepcontrol.wait to its first matrix product."""

    def __init__(self, kernel: Kernel) -> None:
        self._counts: dict[Warp, int] = {}
        self._ended: set[Warp] = set()
        opcodes = [instruction.opcode for instruction in kernel.program.instructions]
        kernel.steps = [self._counted(*each) for each in zip(kernel.steps, opcodes, strict=True)]

    def _counted(self, step: Step, opcode: str) -> Step:
        is_wait = opcode.startswith("griddepcontrol.wait")
        is_product = opcode.startswith(("mma.", "wgmma.mma_async"))

        def counted(warp: Warp) -> Stop | None:
            if is_wait:
                self._counts[warp] = 0
            elif is_product:
                self._ended.add(warp)
            elif warp in self._counts and warp not in self._ended:
                self._counts[warp] += 1
            return step(warp)

        return counted

    def longest(self) -> int:
        return max(self._counts.values(), default=0)


class _Counter:
    def __init__(self) -> None:
        self.loaded = self.early = 0

    def access(self, how: str, offsets: Array, size: int, early: bool) -> None:
        if how not in ("load", "copy", "bulk load", "prefetch"):
            return
        unit = LINE if how == "prefetch" else SECTOR
        moved = unit * len(np.unique(offsets // unit)) if size <= unit else size * len(offsets)
        self.loaded += moved if how != "prefetch" else 0
        self.early += moved if early else 0


def traffic(device: tuning.Device, call: Callable[[], Any], fill: Mapping[str, float]) -> list[Traffic]:
    """The traffic of every kernel that ``call`` starts on meta tensors, in order. ``fill`` has the values of small
    arguments that decide what a kernel does, by name; other arguments are zeros."""
    found: list[Traffic] = []
    compile_ = JITFunction.run

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> CompiledKernel:
        compiled = compile_(self, *args, grid=grid, warmup=True, **keywords)
        given = dict(zip(self.arg_names, args, strict=False)) | keywords
        found.append(_count(self.__name__, compiled, (*grid, 1, 1)[:3], given, fill))
        return compiled

    with tuning.offline(device), active(device), mock.patch.object(JITFunction, "run", run):
        call()
    return found


def _count(
    name: str, compiled: CompiledKernel, grid: tuple[int, int, int], given: Mapping[str, Any], fill: Mapping[str, float]
) -> Traffic:
    kernel, values, programs = Kernel(compiled.asm["ptx"]), parameters(compiled, given), math.prod(grid)
    prologue = _Prologue(kernel)
    storages = Storages(values, compiled.metadata.global_scratch_size * programs, fill)
    storages.memory.leave_early_accesses()
    counter = _Counter()
    storages.memory.observers.append(counter)
    launch = Launch(
        kernel,
        grid,
        storages.bits(values, list(kernel.program.parameters)),
        storages.memory,
        compiled.metadata.shared,
        compiled.metadata.num_warps,
        is_dependent=True,
    )
    random, places = Random(0), sorted({0, programs // 2, programs - 1})
    with np.errstate(all="ignore"):
        for number in places:
            cta = Cta(launch, [int(at) for at in np.unravel_index(number, grid)])
            while not cta.go_on(random):
                pass
    scale = programs / len(places)
    return Traffic(name, round(counter.loaded * scale), round(counter.early * scale), prologue.longest())
