"""Makes calls of C functions. calls.h declares their arguments; this file reads calls.h and has a function per op.

``make.silu_mul(out=..., gate=..., up=..., num_tokens=..., ...)`` returns a Call. The keywords are the fields of
``silu_mul_args``: a tensor or None for a pointer, a number for a long or a double, and for an inner struct the tuple of
its fields (weights.py and pages.py make these tuples). A missing or unknown keyword raises TypeError."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

HEADER = Path(__file__).with_name("calls.h")
# An op's name, the bytes of `call` in team.h, and the tensors that its pointers point to, which must outlive the call
Call = tuple[str, bytes, tuple["Tensor | None", ...]]

_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_LIST = re.compile(r"#define EACH_(\w+)\(\w+\)((?:.*\\\n)*.*)")
_STRUCT = re.compile(r"typedef struct \{(.*?)\}\s*(\w+);", re.DOTALL)
_DECLARATION = re.compile(r"(const )?(\w+) (.+)", re.DOTALL)
_CODES = {"long": "l", "double": "d"}  # format characters of Python's module struct; a pointer is P


class Field(NamedTuple):
    """A field of a struct. ``weight.values`` is the field ``values`` of the inner struct ``weight``."""

    name: str
    code: str  # the format character of Python's module struct: P, l or d
    is_const: bool  # C only reads what the pointer points to
    is_real: bool = False  # the pointer points to activations


class Layout(NamedTuple):
    """The lists and structs of calls.h."""

    lists: dict[str, tuple[str, ...]]  # OP, WEIGHT_FORMAT and PAGES_FORMAT, in the order of the header
    structs: dict[str, tuple[Field, ...]]


def read(text: str) -> Layout:
    """Reads the lists and the structs of a header with the syntax of calls.h. Raises ValueError for a field of another
    type."""
    text = _COMMENT.sub("", text)
    lists = {name: tuple(re.findall(r"\((\w+)\)", body)) for name, body in _LIST.findall(text)}
    structs: dict[str, tuple[Field, ...]] = {}
    for body, name in _STRUCT.findall(text):
        declarations = [line.strip() for line in body.split(";") if line.strip()]
        structs[name] = tuple(field for line in declarations for field in _fields(line, structs))
    return Layout(lists, structs)


def _fields(declaration: str, structs: dict[str, tuple[Field, ...]]) -> list[Field]:
    found = _DECLARATION.fullmatch(declaration)
    const, kind, names = found.groups() if found else ("", "", "")
    fields = []
    for name in (each.strip() for each in names.split(",")):
        if name[:1] == "*" and name[1:].isidentifier():
            fields.append(Field(name[1:], "P", bool(const), kind == "real"))
        elif kind in _CODES and name.isidentifier():
            fields.append(Field(name, _CODES[kind], True))
        elif kind in structs and name.isidentifier():
            inner = structs[kind]
            fields += [
                each._replace(name=f"{name}.{each.name}", is_const=bool(const) or each.is_const) for each in inner
            ]
        else:
            raise ValueError(f"{HEADER.name}: {declaration!r} is no pointer, long, double, or struct of those")
    return fields


LAYOUT = read(HEADER.read_text(encoding="utf-8"))
OPS = LAYOUT.lists["OP"]
FIELDS = {op: LAYOUT.structs[f"{op}_args"] for op in OPS}
_WORD = struct.calcsize("P")  # bytes of a pointer, a long and a double; a test compares with the compiler
FIRST_FIELD = 2 * _WORD  # bytes of a call before its op's struct: op and is_float
CALL_BYTES = FIRST_FIELD + _WORD * max(map(len, FIELDS.values()))


def _maker(op: str) -> Callable[..., Call]:
    """The function that makes calls of an op. Its source is generated and compiled, as namedtuple does: a loop over the
    fields would take as long as a small op."""
    fields = FIELDS[op]
    places = [_place(field.name, fields) for field in fields]
    real = next((field.name for field in fields if field.is_real), "")  # an op's activations have one dtype
    is_float = f"{real}.dtype is float32" if real else "False"
    arguments = dict.fromkeys(field.name.partition(".")[0] for field in fields)
    values, tensors = [], []
    for place, field in zip(places, fields, strict=True):
        if field.code == "P":
            tensors.append(place)
            values.append(f"0 if {place} is None else {place}.data_ptr() or no_address({field.name!r}, {place})")
        else:
            values.append(place)
    text = (
        f"def {op}(*, {', '.join(arguments)}):\n"
        f"    packed = pack({OPS.index(op)}, {is_float}, {', '.join(values)})\n"
        f"    return {op!r}, packed, ({', '.join(tensors)},)"
    )
    missing = CALL_BYTES - FIRST_FIELD - _WORD * len(fields)
    layout = struct.Struct(f"@2l{''.join(field.code for field in fields)}{missing}x")
    scope: dict[str, Any] = {
        "pack": layout.pack,
        "float32": torch.float32,
        "no_address": lambda name, tensor: _no_address(op, name, tensor),
    }
    exec(compile(text, f"<{op} of {HEADER.name}>", "exec"), scope)
    return scope[op]


def _place(name: str, fields: tuple[Field, ...]) -> str:
    """The Python expression for a field: weight.values is the first element of the tuple passed as ``weight``."""
    outer, _, inner = name.partition(".")
    if not inner:
        return outer
    beside = [field.name for field in fields if field.name.startswith(f"{outer}.")]
    return f"{outer}[{beside.index(name)}]"


def _no_address(op: str, name: str, tensor: Tensor) -> int:
    """The address 0 of an empty tensor. Raises TypeError for any other tensor, which should have an address."""
    if tensor.numel():
        raise TypeError(
            f"{op}: {name}, of shape {list(tensor.shape)}, has no memory; expected a tensor whose values lie in memory "
            "(its storage was freed, or it stands for other tensors or for zeros that nobody wrote)"
        )
    return 0


make: Any = SimpleNamespace(**{op: _maker(op) for op in OPS})
