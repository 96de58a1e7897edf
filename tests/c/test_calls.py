"""Calls of C functions: calls.py and the compiler read the same structs from calls.h."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from c import emulated

from qwenkern.kernels.c import compiler, pages, targets, weights
from qwenkern.kernels.c.calls import CALL_BYTES, FIELDS, FIRST_FIELD, HEADER, LAYOUT, OPS, Field, make, read

COMPILERS = {"this machine's": compiler.command()[0], "Arm's": emulated.ARM[0]}


def assertions(structs: dict[str, tuple[Field, ...]]) -> str:
    """A C file that compiles only where every field lies where Python puts it, and is as large."""
    word = struct.calcsize("P")
    headers = ('"weights.h"', '"pages.h"', '"blocks.h"', '"team.h"', "<stddef.h>")
    lines = [f"#include {header}" for header in headers]
    for name, fields in structs.items():
        lines.append(f"_Static_assert(sizeof({name}) == {word * len(fields)}, {{}});")
        for place, field in enumerate(fields):
            where = f"offsetof({name}, {field.name})"
            lines.append(f"_Static_assert({where} == {word * place}, {{}});")
            pointer = {"P": "sizeof(void *)", "l": "sizeof(long)", "d": "sizeof(double)"}[field.code]
            lines.append(f"_Static_assert(sizeof((({name} *)0)->{field.name}) == {pointer}, {{}});")
    lines.append(f"_Static_assert(sizeof(call) == {CALL_BYTES} && offsetof(call, {OPS[0]}) == {FIRST_FIELD}, {{}});")
    lists = {"op": OPS, "weight": LAYOUT.lists["WEIGHT_FORMAT"] + LAYOUT.lists["GROUPED_FORMAT"]}
    lists |= {"pages": LAYOUT.lists["PAGES_FORMAT"], "blocks": LAYOUT.lists["BLOCK_FORMAT"]}
    for suffix, names in lists.items():
        lines += [f"_Static_assert({n}_{suffix} == {i}, {{}});" for i, n in enumerate(names)]
    return "\n".join(line.replace("{}", f'"{line.partition("(")[2].partition(",")[0]}"') for line in lines)


def compiles(command: str, text: str, place: Path) -> subprocess.CompletedProcess[str]:
    file = place / "layout.c"
    file.write_text(text)
    flags = targets.native().flags if command == compiler.command()[0] else ()
    return subprocess.run(
        [command, *flags, f"-I{compiler.SOURCES}", "-fsyntax-only", str(file)], capture_output=True, text=True
    )


@pytest.mark.parametrize("whose", COMPILERS)
def test_structs_lie_in_c_as_python_packs_them(whose: str, tmp_path: Path) -> None:
    command = COMPILERS[whose]
    if not shutil.which(command):
        pytest.skip(f"needs {command}")
    done = compiles(command, assertions(LAYOUT.structs), tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_field_elsewhere_is_noticed(tmp_path: Path) -> None:
    """Two of the same size in another order; and one that the struct does not have."""
    first, second, *others = LAYOUT.structs["silu_mul_args"]
    for fields in ((second, first, *others), (first, second, *others, Field("more", "l", True))):
        done = compiles(COMPILERS["this machine's"], assertions({"silu_mul_args": fields}), tmp_path)
        assert done.returncode != 0


def test_a_call_is_its_number_and_its_fields() -> None:
    out, x, table = (torch.ones(2, 3).bfloat16() for _ in range(3))
    op, packed, tensors = make.silu_mul(out=out, gate=x, up=table, num_tokens=2, row_size=3, gate_stride=5, up_stride=7)
    assert (op, tensors) == ("silu_mul", (out, x, table))
    pointers = [each.data_ptr() for each in tensors]
    assert struct.unpack_from("@2l3P4l", packed) == (OPS.index("silu_mul"), 0, *pointers, 2, 3, 5, 7)
    assert len(packed) == CALL_BYTES


def test_a_call_says_the_type_of_its_activations() -> None:
    sizes = {"num_tokens": 2, "row_size": 3, "gate_stride": 5, "up_stride": 7}
    for dtype, is_float in ((torch.bfloat16, 0), (torch.float32, 1)):
        x = torch.ones(2, 3, dtype=dtype)
        _, packed, _ = make.silu_mul(out=x, gate=x, up=x, **sizes)
        assert struct.unpack_from("@2l", packed) == (OPS.index("silu_mul"), is_float)


def test_a_struct_within_a_struct_is_a_tuple_of_its_fields() -> None:
    x, w, out = (torch.ones(1, 32).bfloat16() for _ in range(3))
    nothing = weights.NO_WEIGHT[3:]
    given = {field.name.partition(".")[0]: None if field.code == "P" else 0 for field in FIELDS["linear"]}
    given |= {"out": out, "x": x, "weight": (w, 64, 0, *nothing), "up": (None, 0, 0, *nothing), "eps": 0.5}
    _, packed, tensors = make.linear(**given)
    values = dict(zip((field.name for field in FIELDS["linear"]), _values(packed, FIELDS["linear"]), strict=True))
    assert values["weight.values"] == w.data_ptr()
    assert (values["weight.row_bytes"], values["up.values"], values["eps"]) == (64, 0, 0.5)
    assert any(each is w for each in tensors)


def _values(packed: bytes, fields: tuple[Field, ...]) -> tuple:
    return struct.unpack_from(f"@{''.join(field.code for field in fields)}", packed, FIRST_FIELD)


def test_an_argument_too_few_or_too_many_is_an_error() -> None:
    given = {
        "out": torch.empty(1),
        "gate": None,
        "up": None,
        "num_tokens": 0,
        "row_size": 0,
        "gate_stride": 0,
        "up_stride": 0,
    }
    make.silu_mul(**given)
    with pytest.raises(TypeError, match="up_stride"):
        make.silu_mul(**{name: value for name, value in given.items() if name != "up_stride"})
    with pytest.raises(TypeError, match="down"):
        make.silu_mul(**given, down=1)


def test_a_tensor_without_memory_is_an_error() -> None:
    given = {"out": torch.empty(1), "up": None, "num_tokens": 0, "row_size": 0, "gate_stride": 0, "up_stride": 0}
    make.silu_mul(gate=torch.empty(0), **given)
    freed = torch.ones(4)
    freed.untyped_storage().resize_(0)
    with pytest.raises(TypeError, match=r"silu_mul: gate, of shape \[4\], has no memory"):
        make.silu_mul(gate=freed, **given)


@pytest.mark.parametrize("line", ["int rows;", "unsigned long rows;", "long rows[2];", "other rows;"])
def test_a_field_of_another_kind_is_an_error(line: str) -> None:
    text = HEADER.read_text().replace("long row_bytes;", line, 1)
    assert line in text
    with pytest.raises(ValueError, match=r"calls.h: .* is no pointer, long, double, or struct of those"):
        read(text)


def test_what_is_const_is_read_only() -> None:
    const = {field.name for field in FIELDS["decode_attention"] if field.code == "P" and field.is_const}
    cache = {f"cache.{name}" for name in ("k", "v", "k_scales", "v_scales")}
    assert const == {"q", *cache, "cache.channels", "block_tables", "lengths"}
    written = {field.name for field in FIELDS["rope_and_cache"] if field.code == "P" and not field.is_const}
    assert written == {"q_out", *cache}


def test_every_format_in_c_has_its_struct() -> None:
    """One that calls.h has and Python does not would be refused without a word."""
    assert list(weights.STRUCTS) == [*LAYOUT.lists["WEIGHT_FORMAT"], *LAYOUT.lists["GROUPED_FORMAT"]]
    assert list(pages.STRUCTS) == list(LAYOUT.lists["PAGES_FORMAT"])
