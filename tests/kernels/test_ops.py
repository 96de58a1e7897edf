"""What every op has. The ops are those that are registered: what a new one lacks is named here."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from qwenkern import kernels
from qwenkern.benchmarks.ops.cases import CASES
from qwenkern.kernels.c.backend import C
from qwenkern.kernels.dispatch import BACKENDS, OPS

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "kernels"


def test_every_op_is_exported():
    assert set(OPS) == set(kernels.__all__) - {"Pages", "Weight"}, "kernels/__init__.py exports others"
    assert all(getattr(kernels, name) is op for name, op in OPS.items())


@pytest.mark.parametrize("file", sorted(FOLDER.rglob("*.py")), ids=lambda file: str(file.relative_to(FOLDER)))
def test_every_file_is_imported(file):
    """One that is not registers nothing, and another backend would run in its place without a word."""
    if file.name in ("namesake.py", "reference.py"):
        return  # for those who import them by their names
    name = ".".join(["qwenkern", "kernels", *file.relative_to(FOLDER).with_suffix("").parts])
    assert name.removesuffix(".__init__") in sys.modules, f"nobody imports {file}"


@pytest.mark.parametrize("name", OPS)
def test_an_op_is_documented_measured_and_tested(name):
    assert (OPS[name].__doc__ or "").strip(), f"{name} has no docstring"
    page = (ROOT / "docs" / "api" / "ops.md").read_text(encoding="utf-8")
    assert re.search(rf"^::: qwenkern\.kernels\.\w+\.{name}$", page, re.M), f"docs/api/ops.md does not have {name}"
    assert name in {case.op for case in CASES}, f"benchmarks/ops/cases.py has no case of {name}"
    asked = re.compile(rf'"{name}"|\.{name}\(')
    tests = [file for file in FOLDER.parent.glob("tests/kernels/test_*.py") if file.name != "test_arguments.py"]
    assert any(asked.search(file.read_text(encoding="utf-8")) for file in tests), f"tests/kernels has no test of {name}"


@pytest.mark.parametrize("name", C.implementations)
def test_an_op_in_c_is_tested_there(name):
    text = (ROOT / "tests" / "c" / "test_ops.py").read_text(encoding="utf-8")
    assert re.search(rf"fast\.{name}\(|kernels\.{name}\(", text), f"tests/c/test_ops.py does not call fast.{name}"


@pytest.mark.parametrize("file", sorted((ROOT / "tests" / "kernels").glob("test_*.py")), ids=lambda file: file.stem)
def test_the_tests_of_a_kernel_run_on_its_ptx(file):
    """Of those files that break one on purpose."""
    if file.stem in ("test_mutations", "test_attention"):  # the second has the kernels of the two beside it
        return
    mutated = re.search(r'^\s+"triton/\w+\.py",$|Mutation\([^)]*"triton/', file.read_text(encoding="utf-8"), re.M)
    listed = f"import {file.stem}\n" in (ROOT / "tests" / "ptx" / "test_kernels.py").read_text(encoding="utf-8")
    assert listed or not mutated, f"tests/ptx/test_kernels.py runs no test of {file.stem}"


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_a_backend_says_why_it_does_not_run(backend):
    """Its name is that of its folder, and each implementation says in words what it does not take."""
    assert (FOLDER / backend.name).is_dir()
    assert backend.implementations, f"kernels/{backend.name}/ implements nothing"
    assert all(name in OPS for name in backend.implementations)
