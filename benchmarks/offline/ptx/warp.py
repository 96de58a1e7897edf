"""A warp: 32 lanes that take each instruction together, and how its operands are read and written.

A register has no value before it is written. After a guarded load, it has no value in the lanes that took no part. The
result of a computation with such a register has no value either. That becomes a fault when the result is used as an
address or as the predicate of a guard, or is stored."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .faults import Fault, Unknown
from .parse import BY_VALUE, Address, Instruction, Name, Number, Operand, Program, Register, Vector
from .under_way import UnderWay
from .values import LANES, PRED, STORED, TYPES, U32, U64, Array, Type, constant

if TYPE_CHECKING:
    from .launch import Cta


class Stop(enum.Enum):
    """The reason why a warp stops and another one runs."""

    BARRIER = enum.auto()
    TURN = enum.auto()  # it may go on at once
    POLL = enum.auto()  # it waits for something that may happen when others have run
    END = enum.auto()


Step = Callable[["Warp"], Stop | None]
Source = Callable[["Warp"], Array]
Target = Callable[["Warp", Array], None]

STEPS = 2_000_000  # the most instructions of a warp between two stops: a loop that does not end is a fault
EVERY, NO = np.full(LANES, True), np.full(LANES, False)
LOW, HIGH = 1, 2  # flags: the low or the high half of a register has no value
NOTHING, WHOLE = np.zeros(LANES, np.uint8), np.full(LANES, LOW | HIGH, np.uint8)
_GARBAGE = {bits: np.full(LANES, 0x7FDEAD01_7FDEAD01 & ((1 << bits) - 1)).astype(STORED[bits]) for bits in STORED}


class Warp:
    def __init__(self, cta: Cta, number: int) -> None:
        self.cta, self.number = cta, number
        self.registers: list[Array | None] = [None] * len(cta.program.registers)
        self.undefined: dict[int, Array] = {}  # for written registers, the flags (LOW, HIGH) of each lane
        self.without: Array | None = None  # the same flags for the operands of the present instruction
        self.active: Array | None = None  # lanes that take part in the present instruction; None: all
        self.at = 0  # the next instruction
        self.waits = cta.is_dependent  # True until griddepcontrol.wait
        self.under_way = UnderWay()
        self.barrier = (0, cta.num_warps)  # the barrier at which it waits, and the number of warps of that barrier
        lane = np.arange(LANES, dtype=U32)
        self.special = {"%tid.x": lane + U32(LANES * number), "%laneid": lane, "%tid.y": lane * 0, "%tid.z": lane * 0}
        for prefix, sizes in (("%ctaid", cta.place), ("%nctaid", cta.grid), ("%ntid", (LANES * cta.num_warps, 1, 1))):
            for axis, size in zip("xyz", sizes, strict=True):
                self.special[f"{prefix}.{axis}"] = np.full(LANES, size, U32)

    def run(self) -> Stop:
        """Runs up to the next stop."""
        steps = self.cta.steps
        try:
            for _ in range(STEPS):
                step = steps[self.at]
                self.at += 1
                stop = step(self)
                if self.without is not None:
                    self.without = None
                if stop:
                    return stop
            raise Fault(f"{STEPS} instructions without a barrier")
        except Fault as fault:
            instruction = self.cta.program.instructions[self.at - 1]
            place = f"warp {self.number} of CTA {self.cta.place} in {self.cta.program.name}, {instruction.source}"
            raise Fault(f"{fault} [{place}: {instruction.text}]") from None

    def lanes(self) -> Array | None:
        """The numbers of the active lanes; None: all."""
        return None if self.active is None else np.nonzero(self.active)[0]

    def write(self, register: int, bits: Array) -> None:
        if self.active is None and self.without is None:
            self.registers[register] = bits
            if self.undefined:
                self.undefined.pop(register, None)
            return
        active = EVERY if self.active is None else self.active
        before = self.registers[register]
        missing = WHOLE if before is None else self.undefined.get(register, NOTHING)
        self.registers[register] = bits if before is None else np.where(active, bits, before)
        missing = np.where(active, NOTHING if self.without is None else self.without, missing)
        self.undefined.pop(register, None)
        if np.count_nonzero(missing):
            self.undefined[register] = missing

    def lacks(self, missing: Array) -> None:
        """Notes that an operand, or half of it, has no value in some lanes."""
        self.without = missing if self.without is None else self.without | missing

    def need(self, what: str) -> None:
        """Raises Fault if an operand has no value in an active lane."""
        if self.without is None:
            return
        missing = self.without if self.active is None else self.without * self.active
        if np.count_nonzero(missing):
            raise Fault(f"{what} comes from a register that lane {np.nonzero(missing)[0][0]} has never written")
        self.without = None

    def all_together(self, what: str) -> None:
        if self.active is not None:
            raise Fault(f"{what} by {np.count_nonzero(self.active)} of a warp's 32 lanes")


def source(operand: Operand, type_: Type, program: Program, wider: bool = False, copied: bool = False) -> Source:
    """Reads an operand as elements of a type. ``wider``: its register may have more bits, which are cut off (section
    9.4.1). ``copied``: if one half has no value, the other half still has one, as in a packed type."""
    if isinstance(operand, Number):
        value = constant(operand.bits, type_)
        return lambda warp: value
    if isinstance(operand, Name):
        return _named(operand, type_, program)
    if not isinstance(operand, Register):
        raise Unknown(f"operand {operand}")
    slot, bits, dtype = operand.slot, TYPES[operand.type].bits, type_.dtype
    garbage, halves = _GARBAGE[bits], copied or type_.is_packed
    if bits != type_.bits and not (wider and bits > type_.bits):
        raise Unknown(f"{operand.name} of {bits} bits as {type_.name}")

    def read(warp: Warp) -> Array:
        value = warp.registers[slot]
        if value is None:
            if slot in warp.under_way.sums:
                raise Fault(f"reads {operand.name}, which a product may still write")
            warp.lacks(WHOLE)
            return garbage
        if warp.undefined and slot in warp.undefined:
            missing = warp.undefined[slot]
            warp.lacks(missing if halves else np.where(missing, WHOLE, NOTHING))
        return value

    if bits != type_.bits:
        return lambda warp: read(warp).astype(type_.stored).view(dtype)
    if dtype is STORED[bits]:
        return read
    return lambda warp: read(warp).view(dtype)


def _named(name: Name, type_: Type, program: Program) -> Source:
    """Reads a special register (section 10), the address of shared memory, which is 0, or that of a parameter."""
    if name.text in program.shared and type_.bits >= 32:
        value = constant(0, type_)
        return lambda warp: value
    if program.parameters.get(name.text) == BY_VALUE and type_.bits == 64:
        return lambda warp: constant(warp.cta.arguments[name.text], type_)
    if name.text.startswith("%") and type_.bits == 32:

        def read(warp: Warp) -> Array:
            if name.text not in warp.special:
                raise Unknown(f"special register {name.text}")
            return warp.special[name.text].view(type_.dtype)

        return read
    raise Unknown(f"{name.text} as {type_.name}")


def target(operand: Operand, type_: Type, wider: bool = False) -> Target:
    """Writes elements of a type to a register. ``wider``: the register may have more bits, which a signed integer's
    sign fills (section 9.4.1)."""
    if operand == Name("_"):
        return lambda warp, value: None
    if not isinstance(operand, Register):
        raise Unknown(f"destination {operand}")
    slot, bits = operand.slot, TYPES[operand.type].bits
    stored = STORED[bits]
    if bits == type_.bits:
        if type_.dtype is stored:
            return lambda warp, value: warp.write(slot, value)
        return lambda warp, value: warp.write(slot, value.view(stored))
    if not wider or bits < type_.bits:
        raise Unknown(f"{type_.name} into {operand.name} of {bits} bits")
    return lambda warp, value: warp.write(slot, value.astype(stored))  # numpy fills with the sign of signed integers


def address(operand: Operand, program: Program) -> Source:
    """Reads an address, as int64."""
    if not isinstance(operand, Address):
        raise Unknown(f"address {operand}")
    offset = np.int64(operand.offset)
    if isinstance(operand.base, Register) and operand.base.type in ("b64", "u64", "s64"):
        read = source(operand.base, Type("b64", U64, 64), program)
        return lambda warp: read(warp).view(np.int64) + offset
    read = source(operand.base, Type("b32", U32, 32), program)
    return lambda warp: read(warp).astype(np.int64) + offset


def items(operand: Operand) -> Sequence[Operand]:
    return operand.items if isinstance(operand, Vector) else [operand]


def guarded(step: Step, register: Register, negated: bool, program: Program) -> Step:
    """Section 9.3: only lanes whose predicate is true take part; if there are none, the warp goes on."""
    read = source(register, PRED, program)
    every, no = EVERY.tobytes(), NO.tobytes()
    if negated:
        every, no = no, every

    def run(warp: Warp) -> Stop | None:
        predicate = read(warp)
        warp.need("a guard")
        bits = predicate.tobytes()
        if bits == every:
            return step(warp)
        if bits == no:
            return None
        warp.active = ~predicate if negated else predicate
        try:
            return step(warp)
        finally:
            warp.active = None

    return run


def only(instruction: Instruction, known: Sequence[str]) -> None:
    """Raises Unknown if an instruction has a modifier that is not implemented."""
    if unknown := [each for each in instruction.modifiers if each not in known]:
        raise Unknown(f"{instruction.opcode}: .{', .'.join(unknown)}")
