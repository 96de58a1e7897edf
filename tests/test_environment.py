"""The environment variables: which are read, where, and their documentation."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import qwenkern
from qwenkern.kernels import environment

ROOT = Path(qwenkern.__file__).parents[1]
TABLE = ROOT / "docs" / "environment.md"


def test_the_documented_table_is_that_of_the_file():
    rows = re.findall(r"^\| `(QWENKERN_\w+)` \| (.*) \| (.*) \|$", TABLE.read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == [(each.name, each.meaning, each.default) for each in environment.VARIABLES]


def test_each_variable_of_the_file_is_in_its_list():
    declared = {each.name for each in vars(environment).values() if isinstance(each, environment.Variable)}
    assert declared == {each.name for each in environment.VARIABLES}


def test_no_other_file_names_a_variable_in_its_code():
    """What may read or set one: a text that is its name and nothing else."""
    files = [ROOT / "setup.py", ROOT / "qwenkern_start.py"]
    for folder in ("qwenkern", "kernels", "benchmarks"):
        files += (ROOT / folder).rglob("*.py")
    own = Path(environment.__file__).resolve()
    for file in files:
        if file.resolve() != own:
            texts = [
                each.value for each in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(each, ast.Constant)
            ]
            assert not [text for text in texts if re.fullmatch(r"QWENKERN_\w+", str(text))], file


def test_it_imports_the_standard_library_only():
    for name in ("environment.py", "ownership.py"):
        code = f"import runpy, sys; runpy.run_path({str(ROOT / 'kernels' / name)!r}); print('torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout == "False\n"


@pytest.mark.parametrize("variable", environment.VARIABLES, ids=lambda each: each.name)
def test_a_variable_set_to_nothing_is_not_set(variable, monkeypatch):
    monkeypatch.setenv(variable.name, "")
    assert variable.get() is None
    monkeypatch.delenv(variable.name)
    assert variable.get() is None


@pytest.mark.parametrize(("variable", "text", "value"), [
    (environment.THREADS, "7", 7), (environment.THREADS, " 7 ", 7), (environment.THREADS, "1024", 1024),
    (environment.KERNELS, "triton", "triton"), (environment.KERNELS, "reference", "reference"),
    (environment.FOLLOW_LINKS, "1", True), (environment.FOLLOW_LINKS, "0", False),
    (environment.REQUIRE_C, "1", True), (environment.REQUIRE_C, "yes", False),
    (environment.CONFIG_DIR, "~/tuned", "~/tuned"),
])  # fmt: skip
def test_values(variable, text, value, monkeypatch):
    monkeypatch.setenv(variable.name, text)
    assert variable.get() == value


@pytest.mark.parametrize(("variable", "text", "expected"), [
    (environment.THREADS, "1025", "QWENKERN_THREADS is '1025'; expected a whole number from 1 to 1024, or unset"),
    (environment.THREADS, "four", "QWENKERN_THREADS is 'four'; expected a whole number from 1 to 1024, or unset"),
    (environment.KERNELS, "cuda", "QWENKERN_KERNELS is 'cuda'; expected triton or reference, or unset"),
])  # fmt: skip
def test_a_value_that_cannot_be_read_names_its_variable(variable, text, expected, monkeypatch):
    monkeypatch.setenv(variable.name, text)
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        variable.get()
