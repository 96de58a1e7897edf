"""The tables of README.md and docs/performance.md, from the results that are committed.

    make results        python benchmarks/tables.py

What stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->` is written anew, and nothing else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qwenkern import Config
from qwenkern.benchmarks.offline import plan

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def markdown(headings: list[str], rows: list[list[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def predicted(compiled: dict[str, Any]) -> str:
    """Floors on an H100, and what the machine code for sm_90 looks like."""
    floors = {(row["case"], row["tokens"]): row for row in compiled["h100_floors"]}
    rows = []
    for row in compiled["kernels"]:
        code, floor = row["code"], floors[row["case"], row["tokens"]]
        programs = 1
        for side in row["grid"]:
            programs *= side
        cells = [row["case"], str(row["tokens"]), f"{floor['paper_us']:.2f}", f"{floor['copy_us']:.2f}"]
        cells += [row["kernel"].strip("_").removesuffix("_kernel"), str(programs), str(row["occupancy"])]
        cells += [str(code["registers"]), f"{code['shared'] / 1024:.0f}", " ".join(code["matrix"])]
        rows.append(cells)
    headings = ["op", "tokens", "floor at 3.35 TB/s, µs", "at 3.0 TB/s, µs", "kernel", "programs", "a multiprocessor"]
    headings += ["registers", "shared KiB", "matrix instruction"]
    note = f"Compiled by Triton {compiled['triton']} on {compiled['date']}; nothing here was measured."
    return f"{note}\n\n{markdown(headings, rows)}"


def planned(compiled: list[dict[str, Any]]) -> str:
    """A step of Qwen2.5-3B on an H100, op by op, and what it makes of the targets."""
    config = Config.from_name("qwen2.5-3b")
    rows = []
    for part in plan.step(config, 1, 1024, compiled):
        cells = [part.op, str(part.launches), f"{part.bytes / 1e6:.1f}", f"{part.bytes / plan.COPY * 1e6:.1f}"]
        rows.append([*cells, "" if part.ahead is None else f"{part.ahead / 1024:.0f}", f"{part.seconds * 1e6:.1f}"])
    headings = [
        "op, 1 sequence of 1,024 tokens",
        "launches",
        "MB",
        "floor at 3.0 TB/s, µs",
        "KiB ahead",
        "predicted µs",
    ]
    steps = []
    for sequences, context, share in plan.TARGETS:
        parts = plan.step(config, sequences, context, compiled)
        paper = plan.on_paper(parts, sequences)
        bounds = [plan.tokens_per_second(parts, sequences, hidden) for hidden in (False, True)]
        nodes = sum(part.launches for part in parts)
        cells = [str(sequences), f"{context:,}", f"{paper:.0f}", f"{share * paper:.0f} ({share:.0%})"]
        steps.append([*cells, str(nodes), f"{bounds[0]:.0f} to {bounds[1]:.0f}", measured(sequences, context)])
    heads = ["sequences", "context", "tokens/s on paper", "target", "graph nodes", "predicted tokens/s", "measured"]
    return f"{markdown(headings, rows)}\n\n{markdown(heads, steps)}"


def measured(sequences: int, context: int) -> str:
    """Tokens a second of that decode step on the H100, as `qwenkern bench --where` timed its replays."""
    file = RESULTS / "nvidia-h100-80gb-hbm3" / "where.json"
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    seconds = [row["seconds"] for row in rows if (row["sequences"], row["context"]) == (sequences, context)]
    return f"{sequences / sum(seconds):.0f}" if seconds else "not yet measured"


def kernels(document: dict[str, Any]) -> str:
    """Our time, its share of the measured ceiling, and everybody else's time over ours."""
    found: dict[tuple[str, int, int], dict[str, dict[str, Any]]] = {}
    for row in document["rows"]:
        found.setdefault((row["case"], row["tokens"], row["context"]), {})[row["provider"]] = row
    others = list(dict.fromkeys(row["provider"] for row in document["rows"] if row["provider"] != "qwenkern"))
    rows = []
    for (case, tokens, _), by_provider in found.items():
        mine = by_provider.get("qwenkern")
        if not mine or not mine["seconds"]:
            rows.append([case, str(tokens), "failed", *[""] * (2 + len(others))])
            continue
        share = max(mine["of_copy"], mine["of_matrix"])
        cells = [case, str(tokens), f"{mine['seconds']['p50'] * 1e6:.2f}", f"{mine['floor'] * 1e6:.2f}", f"{share:.0%}"]
        rows.append(cells + [_ratio(by_provider.get(name)) for name in others])
    headings = ["op", "tokens", "µs", "floor µs", "of the ceiling", *(f"{name} / ours" for name in others)]
    return f"{_when(document)}\n\n{markdown(headings, rows)}"


def _ratio(row: dict[str, Any] | None) -> str:
    if not row or not row["seconds"]:
        return ""
    return f"{row['ratio']['p50']:.2f}" + ("" if row["same"] else " *")


Shown = tuple[str, list[str], list[list[str]]]  # a line above, headings, cells


def end_to_end(document: dict[str, Any]) -> Shown:
    """Losses are printed like wins."""
    rows = []
    for row in document["rows"]:
        cells = [str(row["batch"]), str(row["prompt"]), row["engine"]]
        if "error" in row:
            rows.append([*cells, "failed", *[""] * 5])
            continue
        for rate, share, speedup in (
            ("prompt_tokens_per_second", "of_peak", "prompt_speedup"),
            ("tokens_per_second", "of_bandwidth", "decode_speedup"),
        ):
            cells += [f"{row[rate]:.1f}", f"{row[share]:.0%}" if share in row else "", _spread(row.get(speedup), "")]
        rows.append(cells)
    headings = ["sequences", "prompt", "engine", "prompt tokens/s", "% of multiply-add peak", "speed-up, prompt"]
    headings += ["decode tokens/s", "% of bandwidth limit", "speed-up, decode"]
    said = _whole_model(document)
    if limits := document.get("roofline"):
        products = {"float32": limits["float32"], "bfloat16": limits["bfloat16"]}
        peaks = " and ".join(f"{each[0] / 1e9:.0f} GFLOP/s in {name}" for name, each in products.items() if each[0])
        said += f" A read loop reaches {_spread(limits['bandwidth'], ' GB/s', 1e9, 0)}, multiply-adds {peaks}."
    return said, headings, rows


def contention(document: dict[str, Any]) -> Shown:
    """Decoding beside busy processes, or in two processes at once."""
    count = document.get("busy")
    beside = f"beside {count} busy process{'es' if count > 1 else ''}" if count else "both at once"
    rows = []
    for row in document["rows"]:
        speeds = [_spread(row[name], "", digits=1) for name in ("calm_tokens_per_second", "tokens_per_second")]
        rows.append([row["engine"], *speeds, _spread([100 * share for share in row["share"]], " %", digits=0)])
    return _whole_model(document), ["engine", "calm, tokens/s", f"{beside}, tokens/s", "of calm"], rows


def _spread(values: list[float] | None, unit: str, over: float = 1.0, digits: int = 2) -> str:
    """Median (least to most)."""
    if not values:
        return ""
    middle, least, most = (f"{value / over:.{digits}f}" for value in values)
    return f"{middle}{unit} ({least} to {most})"


def _whole_model(document: dict[str, Any]) -> str:
    said = f"{document['model']}, bfloat16. {_when(document)}"
    if document.get("target"):
        said += f" C for {document['target']}."
    for name, facts in document.get("programs", {}).items():
        said += f" {name}: build {facts.get('build_number')}, {' '.join(facts['flags'])}."
    if document.get("note"):
        said += f" {document['note'].rstrip('.')}."
    if "load_before" in document:
        said += f" Load average before: {document['load_before']:.1f}."
    return said


def shown(make: Callable[[dict[str, Any]], Shown]) -> Callable[[dict[str, Any]], str]:
    """The same as text for a document."""

    def text(document: dict[str, Any]) -> str:
        said, headings, rows = make(document)
        return f"{said}\n\n{markdown(headings, rows)}"

    return text


def _when(document: dict[str, Any]) -> str:
    versions = f"torch {document['torch']}, triton {document['triton']}"
    commit = f", commit {document['commit']}" if document.get("commit") else ""
    return f"{document['device']}, {versions}, {document['date']}{commit}."


# What each block is made of: a kind of table, and the results that are shown so, one below the other.
MAKERS = {
    "kernels": (kernels, "*/kernels*.json"),
    "end_to_end": (shown(end_to_end), "*/end_to_end.json"),
    "end_to_end_more": (shown(end_to_end), "*/end_to_end_*.json"),
    "contention": (shown(contention), "*/contention*.json"),
}


def blocks() -> Iterator[tuple[str, str]]:
    """Every name that may stand in a document, and what belongs there."""
    compiled = plan.COMPILED
    if compiled.exists():
        yield "predicted", predicted(json.loads(compiled.read_text(encoding="utf-8")))
        yield "plan", planned(plan.load())
    for name, (make, files) in MAKERS.items():
        parts = [make(json.loads(file.read_text(encoding="utf-8"))) for file in sorted(RESULTS.glob(files))]
        yield name, "\n\n".join(parts) or "Not yet measured."


def fill(text: str, name: str, content: str) -> str:
    """The text with what stands between a name's markers replaced."""
    pattern = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.S)
    return pattern.sub(lambda found: f"{found[1]}{content}\n{found[2]}", text)


def main() -> None:
    found = dict(blocks())
    for document in (ROOT / "README.md", ROOT / "docs" / "performance.md"):
        text = before = document.read_text(encoding="utf-8")
        for name, content in found.items():
            text = fill(text, name, content)
        if text != before:
            document.write_text(text, encoding="utf-8")
            print(f"wrote {document.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
