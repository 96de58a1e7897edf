"""Control flow and synchronization (sections 9.7.12, 9.7.13). The lanes of a warp stay together: a branch that only
some of them take is a fault."""

from __future__ import annotations

import numpy as np

from . import tensor_maps
from .faults import Fault, Unknown
from .parse import Instruction, Name, Number, Program
from .table import decodes
from .values import LANES, TYPES, U32
from .warp import Step, Stop, Warp, items, only, target


@decodes("bra")
def bra(instruction: Instruction, program: Program) -> Step:
    """9.7.12.3."""
    only(instruction, ("uni",))
    (label,) = instruction.operands
    if not isinstance(label, Name) or label.text not in program.labels:
        raise Unknown(f"label {label}")
    at = program.labels[label.text]

    def step(warp: Warp) -> None:
        warp.all_together("divergent branch: taken")
        warp.at = at

    return step


@decodes("ret")
def ret(instruction: Instruction, program: Program) -> Step:
    """9.7.12.6."""
    only(instruction, ("uni",))

    def step(warp: Warp) -> Stop | None:
        warp.all_together("divergent branch: ret")
        if warp.waits:
            raise Fault("ends without griddepcontrol.wait")
        return Stop.END

    return step


@decodes("trap")
def trap(instruction: Instruction, program: Program) -> Step:
    """9.7.19: ends the kernel with an error."""
    only(instruction, ())

    def step(warp: Warp) -> Stop | None:
        raise Fault("trap")

    return step


@decodes("bar")
@decodes("barrier")
def bar(instruction: Instruction, program: Program) -> Step:
    """9.7.13.1: a barrier of all warps of a CTA, or of the number of threads in the second operand. 9.7.13.3: a barrier
    of all lanes of a warp, which are together anyway."""
    number, *count = instruction.operands
    if instruction.opcode == "bar.warp.sync" and number == Number(-1):
        return lambda warp: warp.all_together("bar.warp.sync")
    if instruction.opcode not in ("bar.sync", "barrier.sync", "barrier.cta.sync"):
        raise Unknown("barrier")
    threads = count[0] if count else None
    if not isinstance(number, Number) or not 0 <= number.bits < 16 or not isinstance(threads, Number | None):
        raise Unknown("a barrier's number")
    if threads and (threads.bits % LANES or not threads.bits):
        raise Unknown(f"barrier of {threads.bits} threads")

    def step(warp: Warp) -> Stop | None:
        warp.all_together(instruction.opcode)
        warp.barrier = number.bits, threads.bits // LANES if threads else warp.cta.num_warps
        return Stop.BARRIER

    return step


@decodes("fence")
def fence(instruction: Instruction, program: Program) -> Step:
    """Fences, such as the one between the ordinary and the asynchronous proxy."""
    if "tensormap::generic" in instruction.modifiers:
        return tensor_maps.acquire(instruction, program)
    only(instruction, ("proxy", "async", "shared::cta", "shared::cluster"))
    if instruction.modifiers[:2] != ["proxy", "async"]:
        raise Unknown("fence")
    return lambda warp: warp.cta.clocks.fence(warp.number)


@decodes("elect")
def elect(instruction: Instruction, program: Program) -> Step:
    """Elects one lane, always the same."""
    only(instruction, ("sync",))
    chosen, mask = instruction.operands
    number, predicate = items(chosen)
    write_number, write = target(number, TYPES["b32"]), target(predicate, TYPES["pred"])
    if mask != Number(-1) and mask != Number(0xFFFFFFFF):
        raise Unknown("some lanes")

    def step(warp: Warp) -> None:
        warp.all_together("elect.sync")
        write_number(warp, np.full(LANES, warp.cta.elected, U32))
        write(warp, np.arange(LANES) == warp.cta.elected)

    return step


@decodes("setmaxnreg")
def setmaxnreg(instruction: Instruction, program: Program) -> Step:
    """Moves registers between warps. It has no effect here, because warps have enough registers."""
    only(instruction, ("inc", "dec", "sync", "aligned", "u32"))
    (count,) = instruction.operands
    if not isinstance(count, Number) or count.bits % 8 or not 24 <= count.bits <= 256:
        raise Unknown("registers")
    return lambda warp: warp.all_together("setmaxnreg")


@decodes("griddepcontrol")
def griddepcontrol(instruction: Instruction, program: Program) -> Step:
    """9.7.13.14: programmatic dependent launch. Before the wait, the previous kernel's results may be missing."""
    (action,) = instruction.modifiers
    if action == "launch_dependents":
        return lambda warp: warp.cta.lets_dependents_start(warp.waits)
    if action != "wait":
        raise Unknown(action)

    def wait(warp: Warp) -> None:
        warp.all_together("griddepcontrol.wait")
        warp.waits = False

    return wait
