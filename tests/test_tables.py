"""The tables in the documents are those of the committed results."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwenkern.benchmarks import tables


@pytest.mark.parametrize("name", ["README.md", "docs/performance.md"])
def test_documents_are_up_to_date(name):
    text = (tables.ROOT / name).read_text(encoding="utf-8")
    for block, content in tables.blocks():
        assert tables.fill(text, block, content) == text, f"{block} in {name}: run `make results`"


def test_only_what_stands_between_the_markers_changes():
    text = "a\n<!-- kernels:begin -->\nold\n<!-- kernels:end -->\nb\n<!-- other:begin -->\n<!-- other:end -->"
    assert tables.fill(text, "kernels", r"new \1") == text.replace("old", r"new \1")
    assert tables.fill(text, "absent", "new") == text


def test_what_failed_is_shown():
    row = {"case": "swiglu", "tokens": 1, "context": 1, "provider": "qwenkern", "seconds": None}
    facts = {"device": "d", "torch": "t", "triton": "t", "date": "2026-01-01"}
    assert "| swiglu | 1 | failed |" in tables.kernels({**facts, "rows": [row]})
    broken = {"batch": 1, "prompt": 2, "engine": "peer", "error": "no"}
    assert "| 1 | 2 | peer | failed |" in tables.end_to_end({**facts, "model": "m", "rows": [broken]})


def test_every_result_is_dated():
    files = [file for file in Path(tables.RESULTS).rglob("*.json")]
    assert files
    assert all('"date"' in file.read_text(encoding="utf-8") for file in files)
