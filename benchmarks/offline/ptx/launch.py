"""Runs a CTA and a grid, and chooses which warp runs next. Several CTAs run at once, in any order. Warps alternate at
barriers and after atomic operations, in an order that a seed fixes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

from . import bulk, control, copies, floats, integers, lanes, mbarriers, movement, products  # noqa: F401 - their tables
from .faults import Fault
from .memory import GlobalMemory
from .order import Clocks
from .parse import Program, parse
from .shared import SharedMemory
from .table import decode
from .values import LANES
from .warp import Step, Stop, Warp

RESIDENT = 6  # CTAs that run at once

Grid = tuple[int, int, int]


class Kernel:
    def __init__(self, ptx: str) -> None:
        self.program: Program = parse(ptx)
        self.steps: list[Step] = [decode(instruction, self.program) for instruction in self.program.instructions]


@dataclass
class Launch:
    """``arguments``: the bits of the kernel's parameters, by name; for a parameter that is passed by value, such as a
    tensor map, its address in ``memory``. ``is_dependent``: griddepcontrol.wait must come before accesses to global
    memory."""

    kernel: Kernel
    grid: Grid
    arguments: Mapping[str, int]
    memory: GlobalMemory
    shared_bytes: int
    num_warps: int
    is_dependent: bool = False
    waits_first: bool = False  # after the run: whether some CTA waited before it let the next kernel start

    def run(self, seed: int) -> None:
        """Runs the grid. Raises Fault at the first error."""
        random = Random(seed)
        places = list(itertools.product(*map(range, self.grid)))
        random.shuffle(places)
        resident: list[Cta] = []
        with np.errstate(all="ignore"):
            while places or resident:
                while places and len(resident) < RESIDENT:
                    resident.append(Cta(self, places.pop(), random.randrange(LANES)))
                cta = random.choice(resident)
                if cta.go_on(random):
                    resident.remove(cta)
                    self.waits_first |= not cta.early_start

    def run_one(self, place: Grid, random: Random) -> None:
        """Runs one CTA, without the others."""
        cta = Cta(self, place, random.randrange(LANES))
        with np.errstate(all="ignore"):
            while not cta.go_on(random):
                pass


class Cta:
    """``elected``: the lane that elect.sync chooses."""

    def __init__(self, launch: Launch, place: Sequence[int], elected: int = 0) -> None:
        self.program, self.steps = launch.kernel.program, launch.kernel.steps
        self.arguments, self.memory = launch.arguments, launch.memory
        self.grid, self.place, self.is_dependent = launch.grid, tuple(place), launch.is_dependent
        self.num_warps, self.elected = launch.num_warps, elected
        self.clocks = Clocks(self.num_warps)
        self.shared = SharedMemory(launch.shared_bytes, self.clocks)
        self.mbarriers = mbarriers.Mbarriers(self.shared, self.clocks)
        self.bulk = bulk.BulkCopies(self)
        self.products = products.WarpGroups(self.num_warps)
        self.warps = [Warp(self, number) for number in range(launch.num_warps)]
        self._running, self._ended = list(self.warps), 0
        self._polling: list[Warp] = []
        self._at_barrier: dict[int, list[Warp]] = {}
        self._stored = [0] * self.num_warps  # the moment of the last store to global memory
        self._released = [0] * self.num_warps
        self.early_start = False

    def lets_dependents_start(self, early: bool) -> None:
        """``early``: the warp that does so has not yet waited itself."""
        self.early_start |= early

    def go_on(self, random: Random) -> bool:
        """Runs one warp up to its next stop. Returns whether all warps have ended."""
        warp = random.choice(self._running)
        stop = warp.run()
        if stop is Stop.TURN:
            return False
        self._running.remove(warp)
        if stop is Stop.BARRIER:
            self._arrive(warp)
        elif stop is Stop.POLL:
            self._polling.append(warp)
        else:
            self._ended += 1
        if self.mbarriers.take_completed():
            self._wake()
        while not self._running and self._ended < self.num_warps:
            self._unblock(random)
        if self._ended == self.num_warps:
            self._end()
        return not self._running

    def _arrive(self, warp: Warp) -> None:
        """The warp arrives at the barrier ``warp.barrier``."""
        number, count = warp.barrier
        waiting = self._at_barrier.setdefault(number, [])
        waiting.append(warp)
        if any(other.barrier != warp.barrier for other in waiting):
            raise Fault(f"barrier {number} for different numbers of warps{self._here()}")
        if len(waiting) == count:
            self._running += self._at_barrier.pop(number)
            self.clocks.barrier([each.number for each in waiting])

    def _wake(self) -> None:
        self._running += self._polling
        self._polling = []

    def _unblock(self, random: Random) -> None:
        """If no warp can go on, completes something that is under way, such as a bulk copy: as late as allowed."""
        if self.bulk.arrives(random):
            if self.mbarriers.take_completed():
                self._wake()
            return
        if self._at_barrier and self._ended and not self._polling:
            raise Fault(
                f"barrier that not all warps reach: {self._ended} of {self.num_warps} ended before{self._here()}"
            )
        waits = [f"warp {each.number} for {self.mbarriers.waited_for(each.number)}" for each in self._polling]
        waits += [f"warp {each.number} at barrier {at}" for at, warps in self._at_barrier.items() for each in warps]
        raise Fault(f"deadlock: {'; '.join(waits)}{self._here()}")

    def _end(self) -> None:
        self.bulk.end()
        self.products.end(self._here())

    def _here(self) -> str:
        return f" [CTA {self.place} in {self.program.name}]"

    def stores(self, warp: int) -> None:
        """A warp stores to global memory."""
        self._stored[warp] = self.clocks.now
        seen = self.clocks.known[warp].seen
        for other, moment in enumerate(self._released):
            if other != warp and moment > seen[other]:
                raise self._not_covered(other, warp)

    def releases(self, warp: int) -> None:
        """An atomic operation of a warp tells other CTAs that they may read what was stored (section 8: causality
        order). It covers stores of other warps only if a barrier comes between."""
        self._released[warp] = self.clocks.now
        seen = self.clocks.known[warp].seen
        for other, moment in enumerate(self._stored):
            if other != warp and moment > seen[other]:
                raise self._not_covered(warp, other)
        self.bulk.releases()

    def _not_covered(self, warp: int, other: int) -> Fault:
        return Fault(
            f"warp {warp} releases what was stored to global memory, and no barrier stands between that and"
            f" the stores of warp {other}"
        )
