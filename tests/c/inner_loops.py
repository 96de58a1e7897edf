"""Finds what the inner loops of compiled C do with the stack, from objdump's listing."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

LINE = re.compile(r"\s+([0-9a-f]+):\s+(?:(?:rep|lock|bnd|notrack|\{vex\}) )?([\w.]+)\s*(.*)")
FUNCTION = re.compile(r"[0-9a-f]+ <(.+)>:")
TARGET = re.compile(r"\b([0-9a-f]+) <")
MULTIPLY_ADD = re.compile(r"vf(n?)m(add|sub)|vdpbf16ps|fml[as]|bfdot|bfmmla|vpmadd|vpdpbusd|sdot")
VECTOR = re.compile(r"%[xyz]mm\d|\b[qdsv]\d+\b")  # of x86-64, of Arm
FRAME = re.compile(r"mov\s+%rsp,%rbp|(?:mov|add)\s+x29, sp")  # sets up a frame pointer; else it is one of many
SLOT = re.compile(r"\(%(rsp|rbp)\)|\[(sp|x29)(?:\]|, #[^\]]*\])")  # a place on the stack that no index moves


@dataclass(frozen=True)
class Loop:
    """An innermost loop that multiplies and adds."""

    function: str
    multiply_adds: int
    stack_moves: tuple[str, ...]  # its instructions that move vectors to or from a fixed place on the stack

    def __str__(self) -> str:
        return f"{self.function}: {len(self.stack_moves)} beside {self.multiply_adds} multiply-adds"


def loops(library: Path, objdump: str = "objdump") -> list[Loop]:
    """Of all functions, in their order."""
    command = [objdump, "-d", "--no-show-raw-insn", str(library)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions: list[tuple[str, list[tuple[int, str, str]]]] = []
    for line in listing.splitlines():
        if named := FUNCTION.match(line):
            functions.append((named[1], []))
        elif (found := LINE.match(line)) and functions:
            functions[-1][1].append((int(found[1], 16), found[2], found[3]))
    return [loop for name, code in functions for loop in _loops(name, code)]


def _loops(function: str, code: list[tuple[int, str, str]]) -> list[Loop]:
    places = {address: place for place, (address, _, _) in enumerate(code)}
    ends = []  # of loops: first and last instruction
    for last, (address, name, operands) in enumerate(code):
        target = TARGET.search(operands) if name.startswith(("j", "b.", "cb", "tb")) or name == "b" else None
        if target and int(target[1], 16) <= address and int(target[1], 16) in places:
            ends.append((places[int(target[1], 16)], last))
    has_frame = any(FRAME.search(f"{name} {operands}") for _, name, operands in code)
    found = []
    for first, last in ends:
        if any(first <= other < last for _, other in ends):
            continue
        body = [f"{name} {operands}" for _, name, operands in code[first : last + 1]]
        multiply_adds = sum(bool(MULTIPLY_ADD.match(each)) for each in body)
        moves = tuple(each for each in body if VECTOR.search(each) and _is_slot(each, has_frame))
        if multiply_adds:
            found.append(Loop(function, multiply_adds, moves))
    return found


def _is_slot(instruction: str, has_frame: bool) -> bool:
    slot = SLOT.search(instruction)
    return slot is not None and (has_frame or (slot[1] or slot[2]) in ("rsp", "sp"))
