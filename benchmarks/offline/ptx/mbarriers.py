"""mbarrier objects in shared memory (section 9.7.13). A phase is complete when all arrivals that the object was
initialized for have come, and all bytes that they announced for bulk copies. Then the next phase begins.

A warp that sees the phase complete knows of everything before its arrivals. The object's eight bytes hold its number,
so a write over them ends the object, as mbarrier.inval does. It is not checked whether initialization is ordered before
a bulk copy that uses the object: Triton makes no fence there."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .faults import Fault, Unknown
from .order import Clocks, Knowledge, nothing
from .parse import Instruction, Name, Number, Program
from .shared import SharedMemory
from .table import decodes
from .values import LANES, TYPES, U8, U64, Array
from .warp import Step, Stop, Warp, address, only, source, target

MAGIC = 0x6D62_6172_0000_0000
MAX_COUNT = (1 << 20) - 1


@dataclass
class Mbarrier:
    at: int  # byte of shared memory
    count: int
    pending: int  # arrivals that the phase lacks
    gathered: Knowledge  # the knowledge of the warps that have arrived in this phase
    completed: Knowledge  # the same of the previous phase
    bytes: int = 0  # bytes that bulk copies have yet to write; below 0 if they arrive before they are announced
    phase: int = 0

    def __str__(self) -> str:
        return f"phase {self.phase} of the mbarrier at byte {self.at}, which lacks {self.pending} arrivals and" + (
            f" {self.bytes} bytes"
        )


@dataclass
class Mbarriers:
    shared: SharedMemory
    clocks: Clocks
    objects: list[Mbarrier] = field(default_factory=list)
    polled: dict[int, Mbarrier] = field(default_factory=dict)  # by warp
    some_completed: bool = False

    def init(self, warp: int, at: int, count: int) -> None:
        if not 1 <= count <= MAX_COUNT:
            raise Fault(f"mbarrier for {count} arrivals")
        self._write(warp, at, MAGIC + len(self.objects))
        none = nothing(len(self.clocks.known))
        self.objects.append(Mbarrier(at, count, count, nothing(len(self.clocks.known)), none))

    def invalidate(self, warp: int, at: int) -> None:
        self.find(warp, at)
        self._write(warp, at, 0)

    def find(self, warp: int, at: int) -> Mbarrier:
        bits = self.shared.load(warp, np.array([at], np.int64), 8)
        number = int(bits.view(U64)[0, 0]) - MAGIC
        if not 0 <= number < len(self.objects) or self.objects[number].at != at:
            raise Fault(f"no mbarrier at byte {at} of shared memory")
        return self.objects[number]

    def arrive(self, warp: int, at: int, count: int, announced: int) -> None:
        mbarrier = self.find(warp, at)
        if count > mbarrier.pending:
            raise Fault(f"{count} arrivals in {mbarrier}")
        mbarrier.bytes += announced
        if not -MAX_COUNT <= mbarrier.bytes <= MAX_COUNT:
            raise Fault(f"more than {MAX_COUNT} bytes in {mbarrier}")
        mbarrier.pending -= count
        if count:
            mbarrier.gathered.join(self.clocks.release(warp))
        self._complete(mbarrier)

    def bytes_arrive(self, mbarrier: Mbarrier, size: int, copy: int) -> None:
        mbarrier.bytes -= size
        mbarrier.gathered.copies.add(copy)
        self._complete(mbarrier)

    def _complete(self, mbarrier: Mbarrier) -> None:
        if mbarrier.pending or mbarrier.bytes:
            return
        mbarrier.completed, mbarrier.gathered = mbarrier.gathered, nothing(len(self.clocks.known))
        mbarrier.phase, mbarrier.pending = mbarrier.phase + 1, mbarrier.count
        self.some_completed = True

    def is_complete(self, warp: int, at: int, parity: int) -> bool:
        mbarrier = self.find(warp, at)
        if mbarrier.phase & 1 == parity:
            self.polled[warp] = mbarrier
            return False
        self.clocks.acquire(warp, mbarrier.completed)
        return True

    def take_completed(self) -> bool:
        """Whether a phase was completed since the last call."""
        some, self.some_completed = self.some_completed, False
        return some

    def waited_for(self, warp: int) -> Mbarrier:
        return self.polled[warp]

    def _write(self, warp: int, at: int, bits: int) -> None:
        self.shared.store_object(warp, np.array([at], np.int64), np.array([[bits]], U64).view(U8))


HOW = ("shared", "shared::cta", "cta", "release", "acquire", "b64")


@decodes("mbarrier")
def mbarrier(instruction: Instruction, program: Program) -> Step:
    action = instruction.modifiers[0]
    decode = {"init": _init, "inval": _inval, "arrive": _arrive, "expect_tx": _expect_tx}.get(action)
    if action in ("try_wait", "test_wait"):
        decode = _wait
    if decode is None:
        raise Unknown(action)
    if not any(each.startswith("shared") for each in instruction.modifiers):
        raise Unknown("generic addresses")
    return decode(instruction, program)


def _active(warp: Warp, *values: Array) -> list[tuple[int, ...]]:
    """The values of each lane that takes part."""
    lanes = range(LANES) if warp.active is None else np.nonzero(warp.active)[0]
    return [tuple(int(value[lane]) for value in values) for lane in lanes]


def _init(instruction: Instruction, program: Program) -> Step:
    only(instruction, ("init", *HOW))
    at, count = address(instruction.operands[0], program), source(instruction.operands[1], TYPES["u32"], program)

    def step(warp: Warp) -> None:
        places, counts = at(warp), count(warp)
        warp.need("an address, or a count,")
        for place, number in _active(warp, places, counts):
            warp.cta.mbarriers.init(warp.number, place, number)

    return step


def _inval(instruction: Instruction, program: Program) -> Step:
    only(instruction, ("inval", *HOW))
    at = address(instruction.operands[0], program)

    def step(warp: Warp) -> None:
        places = at(warp)
        warp.need("an address")
        for (place,) in _active(warp, places):
            warp.cta.mbarriers.invalidate(warp.number, place)

    return step


def _arrive(instruction: Instruction, program: Program) -> Step:
    """One arrival, or the number of arrivals in the last operand; with .expect_tx that operand is a number of bytes.
    The state that the instruction returns is not supported."""
    only(instruction, ("arrive", "expect_tx", *HOW))
    to, place, *rest = instruction.operands
    if to != Name("_"):
        raise Unknown("an mbarrier's state")
    at, number = address(place, program), source(rest[0] if rest else Number(1), TYPES["u32"], program)
    expects = "expect_tx" in instruction.modifiers

    def step(warp: Warp) -> None:
        places, numbers = at(warp), number(warp)
        warp.need("an address, or a count,")
        for place, value in _active(warp, places, numbers):
            count, announced = (1, value) if expects else (value, 0)
            warp.cta.mbarriers.arrive(warp.number, place, count, announced)

    return step


def _expect_tx(instruction: Instruction, program: Program) -> Step:
    only(instruction, ("expect_tx", "relaxed", *HOW))
    at, number = address(instruction.operands[0], program), source(instruction.operands[1], TYPES["u32"], program)

    def step(warp: Warp) -> None:
        places, numbers = at(warp), number(warp)
        warp.need("an address, or a count,")
        for place, value in _active(warp, places, numbers):
            warp.cta.mbarriers.arrive(warp.number, place, 0, value)

    return step


def _wait(instruction: Instruction, program: Program) -> Step:
    """Tests whether the phase of this parity is complete. If it is not, other warps run first."""
    only(instruction, ("try_wait", "test_wait", "parity", *HOW))
    if "parity" not in instruction.modifiers or len(instruction.operands) not in (3, 4):
        raise Unknown("an mbarrier's state")
    to, place, parity = instruction.operands[:3]
    write, at, read = target(to, TYPES["pred"]), address(place, program), source(parity, TYPES["b32"], program)

    def step(warp: Warp) -> Stop | None:
        places, parities = at(warp), read(warp)
        warp.need("an address, or a parity,")
        wanted = set(_active(warp, places, parities & 1))
        if len(wanted) != 1:
            raise Unknown("lanes that wait for different mbarriers")
        ((place, parity),) = wanted
        complete = warp.cta.mbarriers.is_complete(warp.number, place, parity)
        write(warp, np.full(LANES, complete))
        return None if complete else Stop.POLL

    return step
