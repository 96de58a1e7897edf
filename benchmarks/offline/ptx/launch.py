"""A CTA and a grid: which warp goes on when. CTAs come in any order, several of them at once, and warps take turns at
barriers and after atomic operations, in an order that a seed fixes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

from . import control, copies, floats, integers, lanes, movement  # noqa: F401 - they fill the table
from .faults import Fault
from .memory import GlobalMemory
from .parse import Program, parse
from .shared import MAX_WARPS, SharedMemory
from .table import decode
from .warp import Step, Stop, Warp

RESIDENT = 6  # CTAs at once

Grid = tuple[int, int, int]


class Kernel:
    def __init__(self, ptx: str) -> None:
        self.program: Program = parse(ptx)
        self.steps: list[Step] = [decode(instruction, self.program) for instruction in self.program.instructions]


@dataclass
class Launch:
    """``arguments``: the bits of the kernel's parameters, by their names. ``is_dependent``: griddepcontrol.wait must
    come before global memory is touched."""

    kernel: Kernel
    grid: Grid
    arguments: Mapping[str, int]
    memory: GlobalMemory
    shared_bytes: int
    num_warps: int
    is_dependent: bool = False

    def run(self, seed: int) -> None:
        """Raises Fault at the first thing that is wrong."""
        random = Random(seed)
        places = list(itertools.product(*map(range, self.grid)))
        random.shuffle(places)
        resident: list[Cta] = []
        with np.errstate(all="ignore"):
            while places or resident:
                while places and len(resident) < RESIDENT:
                    resident.append(Cta(self, places.pop()))
                cta = random.choice(resident)
                if cta.go_on(random):
                    resident.remove(cta)


class Cta:
    def __init__(self, launch: Launch, place: Sequence[int]) -> None:
        self.program, self.steps = launch.kernel.program, launch.kernel.steps
        self.arguments, self.memory = launch.arguments, launch.memory
        self.grid, self.place, self.is_dependent = launch.grid, tuple(place), launch.is_dependent
        self.num_warps = launch.num_warps
        assert self.num_warps <= MAX_WARPS
        self.shared = SharedMemory(launch.shared_bytes)
        self.warps = [Warp(self, number) for number in range(launch.num_warps)]
        self._running, self._waiting, self._ended = list(self.warps), 0, 0
        self._stored: set[int] = set()  # warps, since the last barrier
        self._released: set[int] = set()

    def go_on(self, random: Random) -> bool:
        """One warp, up to its next stop. True: all have ended."""
        warp = random.choice(self._running)
        stop = warp.run()
        if stop is Stop.TURN:
            return False
        self._running.remove(warp)
        self._waiting += stop is Stop.BARRIER
        self._ended += stop is Stop.END
        if self._running:
            return False
        if self._waiting and self._ended:
            raise Fault(
                f"barrier that not all warps reach: {self._ended} of {self.num_warps} ended before"
                f" [CTA {self.place} in {self.program.name}]"
            )
        if self._waiting:
            self._barrier()
        return not self._running

    def _barrier(self) -> None:
        self._running, self._waiting = list(self.warps), 0
        self.shared.barrier()
        self._stored.clear()
        self._released.clear()

    def stores(self, warp: int) -> None:
        """A warp stores to global memory."""
        self._stored.add(warp)
        self._check_releases()

    def releases(self, warp: int) -> None:
        """An atomic operation of a warp tells other CTAs that what was stored may be read (section 8: causality order).
        It speaks for the other warps only where a barrier stands between."""
        self._released.add(warp)
        self._check_releases()

    def _check_releases(self) -> None:
        for warp in self._released:
            if others := self._stored - {warp}:
                raise Fault(
                    f"warp {warp} releases what was stored to global memory, and no barrier stands between that and"
                    f" the stores of warp {', '.join(map(str, sorted(others)))}"
                )
