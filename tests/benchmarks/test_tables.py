"""The tables in the documents are those of the committed results."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwenkern.benchmarks import tables


@pytest.mark.parametrize("document", tables.DOCUMENTS, ids=lambda document: document.name)
def test_documents_are_up_to_date(document):
    text = document.read_text(encoding="utf-8")
    for block, content in tables.blocks():
        assert tables.fill(text, block, content) == text, f"{block} in {document}: run `make results`"


def test_every_table_stands_in_a_document():
    texts = [document.read_text(encoding="utf-8") for document in tables.DOCUMENTS]
    for block, _ in tables.blocks():
        assert any(f"<!-- {block}:begin -->" in text for text in texts), block


def test_only_what_stands_between_the_markers_changes():
    text = "a\n<!-- kernels:begin -->\nold\n<!-- kernels:end -->\nb\n<!-- other:begin -->\n<!-- other:end -->"
    assert tables.fill(text, "kernels", r"new \1") == text.replace("old", r"new \1")
    assert tables.fill(text, "absent", "new") == text


def test_what_failed_is_shown():
    row = {"case": "swiglu", "tokens": 1, "context": 1, "provider": "qwenkern", "seconds": None}
    facts = {"device": "d", "torch": "t", "triton": "t", "date": "2026-01-01"}
    assert "| swiglu | 1 | failed |" in tables.kernels({**facts, "rows": [row]})
    broken = {"batch": 1, "prompt": 2, "engine": "peer", "error": "no"}
    assert "| 1 | 2 | peer | failed |" in tables.shown(tables.end_to_end)({**facts, "model": "m", "rows": [broken]})


def test_speedups_below_1_are_printed_and_qwenkern_has_none_over_itself():
    facts = {"device": "d", "torch": "t", "triton": "t", "date": "2026-01-01", "model": "m", "target": "x86-64-v3"}
    facts |= {"programs": {"llama.cpp": {"build_number": 7, "flags": ["--flash-attn", "on"]}}, "load_before": 0.25}
    facts |= {"note": "llama.cpp for AVX2.", "roofline": {"bandwidth": [3e10, 2e10, 4e10], "float32": [1e11] * 3}}
    facts["roofline"]["bfloat16"] = [0.0] * 3
    speeds = {"batch": 8, "prompt": 128, "prompt_tokens_per_second": 145.26, "tokens_per_second": 30.0}
    mine = {**speeds, "engine": "qwenkern", "of_bandwidth": 0.851, "of_peak": 0.7}
    theirs = {**speeds, "engine": "llama.cpp file", "of_bandwidth": 0.5}
    theirs |= {"prompt_speedup": [0.5, 0.4, 0.6], "decode_speedup": [1.1, 1.0, 1.25]}
    said, headings, rows = tables.end_to_end({**facts, "rows": [mine, theirs]})
    assert rows[0] == ["8", "128", "qwenkern", "145.3", "70%", "", "30.0", "85%", ""]
    assert rows[1][5:] == ["0.50 (0.40 to 0.60)", "30.0", "50%", "1.10 (1.00 to 1.25)"]
    assert len(headings) == len(rows[0]) == len(rows[1])
    for part in (
        "C backend compiled for x86-64-v3.",
        "llama.cpp: build 7, --flash-attn on.",
        "llama.cpp for AVX2.",
        "Load average before the run: 0.2.",
        "Measured limits: memory bandwidth 30 GB/s (20 to 40), multiply-adds 100 GFLOP/s in float32.",
    ):
        assert part in said


def test_the_summary_has_each_engine_of_a_device_but_not_our_own_kernels():
    def row(engine, decode=None, batch=1):
        found = {"engine": engine, "batch": batch, "prompt": 128, "tokens_per_second": 30.0, "of_bandwidth": 0.851}
        return found | ({"decode_speedup": [decode, 0.1, 9.0], "prompt_speedup": [2.0, 1.0, 3.0]} if decode else {})

    failed = {"engine": "llama.cpp", "batch": 1, "prompt": 128, "error": "no"}
    facts = {"device": "d", "date": "2026-01-01", "model": "m", "target": "x86-64-v3"}
    first = facts | {"rows": [row("qwenkern"), row("transformers", 0.5), failed]}
    second = facts | {"rows": [row("qwenkern"), row("patched", 3.0), row("compiled", 1.25), row("qwenkern", batch=8)]}
    other = facts | {"device": "e", "rows": [row("qwenkern"), row("transformers", 4.0)]}
    *_, line, below = tables.summary([[first, second], [other]]).splitlines()
    assert line == "| m, d, x86-64-v3, 2026-01-01 | 1 | 128 | 30.0 | 85% | 0.50 / 2.00 | 1.25 / 2.00 | failed |  |"
    assert below == "| m, e, x86-64-v3, 2026-01-01 | 1 | 128 | 30.0 | 85% | 4.00 / 2.00 |  |  |  |"


def test_shares_with_other_work_are_shown():
    facts = {"device": "d", "torch": "t", "triton": "t", "date": "2026-01-01", "model": "m"}
    row = {"engine": "qwenkern", "calm_tokens_per_second": [30, 29, 31], "tokens_per_second": [15, 14, 16]}
    row["share"] = [0.5, 0.45, 0.55]
    _, headings, rows = tables.contention({**facts, "busy": 2, "rows": [row]})
    share = "% of speed on the idle machine"
    assert headings == ["engine", "idle machine, tokens/s", "with 2 busy processes, tokens/s", share]
    assert rows == [["qwenkern", "30.0 (29.0 to 31.0)", "15.0 (14.0 to 16.0)", "50 % (45 to 55)"]]
    assert tables.contention({**facts, "twice": True, "rows": [row]})[1][2] == "two processes at once, tokens/s"


def test_the_cost_of_structured_output():
    facts = {"device": "d", "torch": "t", "triton": "t", "date": "2026-01-01", "model": "m"}
    row = {"sequences": 8, "case": "greedy", "free_ms": [40, 39, 41], "schema_ms": [41, 40, 44.44]}
    _, headings, rows = tables.structured({**facts, "rows": [row | {"ratio": [1.025, 1.0, 1.1]}]})
    assert len(headings) == 5
    assert rows == [["8", "greedy", "40.0 (39.0 to 41.0)", "41.0 (40.0 to 44.4)", "1.025 (1.000 to 1.100)"]]


def test_every_result_is_dated():
    files = [file for file in Path(tables.RESULTS).rglob("*.json")]
    assert files
    assert all('"date"' in file.read_text(encoding="utf-8") for file in files)
