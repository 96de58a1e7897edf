"""What comes next, and waiting (sections 9.7.12 control flow, 9.7.13 synchronization). The lanes of a warp stay
together: a branch that they do not all take is a fault."""

from __future__ import annotations

from .faults import Fault, Unknown
from .parse import Instruction, Name, Number, Program
from .table import decodes
from .warp import Step, Stop, Warp, only


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


@decodes("bar")
def bar(instruction: Instruction, program: Program) -> Step:
    """9.7.13.1: the barrier 0 of all warps of a CTA. 9.7.13.3: of all lanes of a warp, which are together anyway."""
    (number,) = instruction.operands
    if instruction.opcode == "bar.warp.sync" and number == Number(-1):
        return lambda warp: warp.all_together("bar.warp.sync")
    if instruction.opcode != "bar.sync" or number != Number(0):
        raise Unknown("barrier")

    def step(warp: Warp) -> Stop | None:
        warp.all_together("bar.sync")
        return Stop.BARRIER

    return step


@decodes("griddepcontrol")
def griddepcontrol(instruction: Instruction, program: Program) -> Step:
    """9.7.13.14: programmatic dependent launch. Until a warp has waited, the kernel before may not have written."""
    (action,) = instruction.modifiers
    if action == "launch_dependents":
        return lambda warp: None
    if action != "wait":
        raise Unknown(action)

    def wait(warp: Warp) -> None:
        warp.all_together("griddepcontrol.wait")
        warp.waits = False

    return wait
