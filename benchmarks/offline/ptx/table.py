"""Looks up instructions by name: those that compute a register from others, and those that do more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .faults import Unknown
from .parse import Instruction, Program
from .values import TYPES, Array, Type
from .warp import Step, Warp, guarded, source, target

Decoder = Callable[[Instruction, Program], Step]


@dataclass(frozen=True)
class Computation:
    """An instruction without side effects, as a function of 32 lanes."""

    compute: Callable[..., Array]
    result: Type
    sources: tuple[Type, ...]
    wider: bool  # operands may have more bits than their types


COMPUTATIONS: dict[tuple[str, int], Computation] = {}  # by whole name and number of sources: "add.s32", 2
DECODERS: dict[str, Decoder] = {}  # by the name up to the first dot: "ld"


def define(opcode: str, compute: Callable[..., Array], result: str, *sources: str, wider: bool = False) -> None:
    assert (opcode, len(sources)) not in COMPUTATIONS, opcode
    COMPUTATIONS[opcode, len(sources)] = Computation(
        compute, TYPES[result], tuple(TYPES[each] for each in sources), wider
    )


def decodes(name: str) -> Callable[[Decoder], Decoder]:
    def register(decoder: Decoder) -> Decoder:
        assert name not in DECODERS, name
        DECODERS[name] = decoder
        return decoder

    return register


def decode(instruction: Instruction, program: Program) -> Step:
    """The function that runs an instruction for a warp. Raises Unknown with the text of an unknown instruction."""
    try:
        computation = COMPUTATIONS.get((instruction.opcode, len(instruction.operands) - 1))
        if computation:
            step = _computed(computation, instruction, program)
        elif (name := instruction.opcode.split(".")[0]) in DECODERS:
            step = DECODERS[name](instruction, program)
        else:
            raise Unknown(f"no such instruction here of {len(instruction.operands)} operands")
    except (Unknown, ValueError, KeyError, IndexError) as unknown:  # another number of operands, or another type
        raise Unknown(f"{instruction.opcode}: {unknown} [{instruction.text}]") from None
    guard = instruction.guard
    return guarded(step, guard.register, guard.negated, program) if guard else step


def _computed(computation: Computation, instruction: Instruction, program: Program) -> Step:
    compute, wider = computation.compute, computation.wider
    destination, *operands = instruction.operands
    write = target(destination, computation.result, wider)
    reads = [source(each, of, program, wider) for each, of in zip(operands, computation.sources, strict=True)]
    if len(reads) == 2:  # most instructions
        x, y = reads

        def step(warp: Warp) -> None:
            write(warp, compute(x(warp), y(warp)))

    else:

        def step(warp: Warp) -> None:
            write(warp, compute(*[read(warp) for read in reads]))

    return step
