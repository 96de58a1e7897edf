"""The examples of the documents run, one after the other, as a reader would type them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.filterwarnings("ignore:qwenkern was tested with transformers")
def test_drop_in_examples():
    text = (ROOT / "docs" / "drop-in.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(examples) >= 4
    names: dict[str, object] = {"__name__": "example"}
    for number, example in enumerate(examples):
        exec(compile(example, f"drop-in.md, example {number + 1}", "exec"), names)


def test_the_readme_lists_all_environment_variables():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.partition("## Environment variables")[2].partition("\n## ")[0]
    named = re.findall(r"QWENKERN_[A-Z_]+", "".join(re.findall(r"^\| (`.*?) \|", table, re.M)))
    files = [ROOT / "setup.py", ROOT / "Makefile"]
    files += [
        file for folder in ("qwenkern", "kernels", "benchmarks", "tests") for file in (ROOT / folder).rglob("*.py")
    ]
    used = {name for file in files for name in re.findall(r"QWENKERN_[A-Z_]*[A-Z]", file.read_text(encoding="utf-8"))}
    assert sorted(named) == sorted(used)
