"""Parses the text of a PTX module with one kernel to instructions (sections 4 to 6: syntax, state spaces, operands).

Only the directives that declare parameters and registers, and the lines of the source, are kept."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from .faults import Unknown


@dataclass(frozen=True)
class Register:
    slot: int  # its index among the registers of a thread
    type: str  # as declared: "b32"
    name: str


@dataclass(frozen=True)
class Number:
    bits: int  # the value of an integer, or the bits of a float


@dataclass(frozen=True)
class Name:
    """A label, a parameter, a variable, or a special register."""

    text: str


@dataclass(frozen=True)
class Address:
    base: Register | Name
    offset: int


@dataclass(frozen=True)
class Vector:
    items: tuple[Operand, ...]


@dataclass(frozen=True)
class TensorAddress:
    """``[map, {0, 64}]``: a box of a tensor."""

    base: Register | Name
    at: Vector


Operand = Register | Number | Name | Address | Vector | TensorAddress
BY_VALUE = "bytes"  # the type of a parameter that is a piece of memory, not a number


@dataclass(frozen=True)
class Guard:
    """``@p`` or ``@!p``."""

    register: Register
    negated: bool


@dataclass(frozen=True)
class Instruction:
    opcode: str  # with its modifiers: "ld.global.v4.b32"
    operands: tuple[Operand, ...]
    guard: Guard | None
    text: str
    source: str  # "linear.py:86", or ""

    @property
    def modifiers(self) -> list[str]:
        return self.opcode.split(".")[1:]


@dataclass
class Program:
    name: str
    parameters: dict[str, str]  # type by name, in order
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: list[Register] = field(default_factory=list)
    shared: set[str] = field(default_factory=set)  # names of the shared memory that a launch gives the kernel
    product_slots: set[int] = field(default_factory=set)  # registers that products of warp groups read or write


_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*)", re.S)
_PARAMETER = re.compile(r"\.param\s+\.(\w+)[^,]*?([\w$]+)(?:\[\d+\])?\s*(?:,|$)")
_SHARED = re.compile(r"\.extern\s+\.shared\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[\]")
_LINE = re.compile(r"\.loc[^\n]*?//\s*([^\s:]+:\d+)[^\n]*|\.loc[^\n]*|//[^\n]*")
_STATEMENT = re.compile(r"\s*(?:([\w$]+):|(\{)|(\})|\.loc ([^\n]*)\n|([^;{}]+(?:\{[^;]*)?);)")
_INSTRUCTION = re.compile(r"(?:@(!?)([%\w$]+)\s+)?([a-z]\w*(?:\.[\w:]+)*)\s*(.*)", re.S)
_DECLARED = re.compile(r"([%\w$]+?)(?:<(\d+)>)?(?:,\s*|$)")
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.S)
_OPERAND = re.compile(r"\s*(\[[^\]]*\]|\{[^}]*\}|[^,]+?)\s*(?:,|$)")


def parse(text: str) -> Program:
    entry = _ENTRY.search(text)
    if not entry or text.count(".entry") > 1 or ".func" in text:
        raise Unknown("a module that is not one kernel and nothing else")
    found = _PARAMETER.findall(_LINE.sub("", entry[2]))
    parameters = {name: BY_VALUE if type_ == "align" else type_ for type_, name in found}
    if len(parameters) != entry[2].count(".param"):
        raise Unknown(f"parameters of {entry[1]}")
    program = Program(entry[1], parameters, shared=set(_SHARED.findall(text)))
    scopes: list[_Scope] = []
    source = ""
    for label, opened, closed, line, statement in _statements(entry[3]):
        if opened:
            scopes.append(_Scope(program, scopes[-1] if scopes else None))
        elif closed:
            scopes.pop().close()
            if not scopes:
                return program
        elif label:
            scopes[-1].label(label)
        elif line:
            source = line
        elif statement.startswith(".reg"):
            scopes[-1].declare(statement)
        elif statement.startswith("."):
            if not statement.startswith(".pragma"):
                raise Unknown(f"directive {statement}")
        else:
            program.instructions.append(_instruction(statement, source, scopes[-1]))
    raise Unknown(f"{program.name} does not end")


def _statements(text: str) -> Iterator[tuple[str, str, str, str, str]]:
    """Labels, braces, lines of the source, and statements, which end with a semicolon. One item of each tuple is not
    empty."""
    text = text[text.index("{") :]
    text = _LINE.sub(lambda found: f".loc {found[1]}\n" if found[1] else "", text)
    at = 0
    while found := _STATEMENT.match(text, at):
        at = found.end()
        label, opened, closed, line, statement = (part or "" for part in found.groups())
        yield label, opened, closed, line, statement.strip()


class _Scope:
    """The registers declared between two braces, and those around them (section 5.3.1)."""

    def __init__(self, program: Program, outer: _Scope | None) -> None:
        self._program, self._outer = program, outer
        self._families: dict[str, tuple[str, int]] = {}  # `.reg .b32 %r<9>;`: the type and number of %r0 to %r8
        self._known: dict[str, Register] = {}
        self._labels: dict[str, str] = {}
        self._start = len(program.instructions)

    def label(self, name: str) -> None:
        """A label is visible only between its braces (section 4.4)."""
        self._labels[name] = f"{name}@{self._start}" if self._outer else name
        self._program.labels[self._labels[name]] = len(self._program.instructions)

    def close(self) -> None:
        """Ends the scope of the labels, whose names may be used again."""
        instructions = self._program.instructions
        for at in range(self._start, len(instructions)) if self._outer else ():
            operands = tuple(
                Name(self._labels.get(each.text, each.text)) if isinstance(each, Name) else each
                for each in instructions[at].operands
            )
            instructions[at] = replace(instructions[at], operands=operands)

    def declare(self, statement: str) -> None:
        found = _REGISTERS.fullmatch(statement)
        if not found:
            raise Unknown(f"directive {statement}")
        type_, names = found.groups()
        for name, count in _DECLARED.findall(names):
            if count:
                self._families[name] = (type_, int(count))
            elif name:
                self._add(name, type_)

    def find(self, name: str) -> Register | None:
        if name in self._known:
            return self._known[name]
        family = re.fullmatch(r"(.*?)(\d+)", name)
        if family and family[1] in self._families and int(family[2]) < self._families[family[1]][1]:
            return self._add(name, self._families[family[1]][0])
        return self._outer.find(name) if self._outer else None

    def _add(self, name: str, type_: str) -> Register:
        register = self._known[name] = Register(len(self._program.registers), type_, name)
        self._program.registers.append(register)
        return register


def _instruction(statement: str, source: str, scope: _Scope) -> Instruction:
    statement = " ".join(statement.split())
    found = _INSTRUCTION.fullmatch(statement)
    if not found:
        raise Unknown(f"statement {statement}")
    negated, guard, opcode, rest = found.groups()
    register = scope.find(guard) if guard else None
    if guard and not register:
        raise Unknown(f"guard of {statement}")
    operands = tuple(_operand(each, scope) for each in _OPERAND.findall(rest))
    return Instruction(opcode, operands, Guard(register, bool(negated)) if register else None, statement, source)


def _operand(text: str, scope: _Scope) -> Operand:
    if text.startswith("{"):
        return Vector(tuple(_operand(each, scope) for each in _OPERAND.findall(text[1:-1].strip())))
    if text.startswith("[") and "{" in text:
        base, _, at = text[1:-1].partition(",")
        where, box = _operand(base.strip(), scope), _operand(at.strip(), scope)
        if not isinstance(where, Register | Name) or not isinstance(box, Vector):
            raise Unknown(f"address {text}")
        return TensorAddress(where, box)
    if text.startswith("["):
        base, _, offset = text[1:-1].partition("+")
        inside = _operand(base.strip(), scope)
        if not isinstance(inside, Register | Name):
            raise Unknown(f"address {text}")
        return Address(inside, _integer(offset.strip() or "0"))
    if "|" in text:  # two destinations
        return Vector(tuple(_operand(each.strip(), scope) for each in text.split("|")))
    if register := scope.find(text):
        return register
    if re.match(r"0[fFdD]", text):
        return Number(int(text[2:], 16))
    if re.match(r"[-0-9]", text):
        return Number(_integer(text))
    if re.fullmatch(r"[%\w$.]+", text):
        return Name(text)
    raise Unknown(f"operand {text}")


def _integer(text: str) -> int:
    """Section 4.5.1: decimal, hexadecimal, octal or binary, with a U if it is unsigned."""
    sign, digits = (-1, text[1:]) if text.startswith("-") else (1, text)
    digits = digits.rstrip("U")
    if re.fullmatch(r"0[0-7]+", digits):
        return sign * int(digits, 8)
    return sign * int(digits, 0)
