"""Writes the tables of README.md and docs/ from the committed results.

    make results        python benchmarks/tables.py

The program replaces the text between `<!-- NAME:begin -->` and `<!-- NAME:end -->`, and leaves the rest of a document
alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from qwenkern import Config
from qwenkern.benchmarks.offline import plan
from qwenkern.benchmarks.ops.inputs import DENSE

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def markdown(headings: list[str], rows: list[list[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def predicted(compiled: dict[str, Any]) -> str:
    """The bandwidth limit of each op on an H100, and facts of its machine code for sm_90."""
    limits = {(row["case"], row["tokens"]): row for row in compiled["h100_floors"]}
    rows = []
    for row in compiled["kernels"]:
        if {row.get("weights", DENSE), row.get("pages", DENSE)} != {DENSE}:
            continue
        code, limit = row["code"], limits[row["case"], row["tokens"]]
        programs = 1
        for side in row["grid"]:
            programs *= side
        cells = [row["case"], str(row["tokens"]), f"{limit['paper_us']:.2f}", f"{limit['copy_us']:.2f}"]
        cells += [row["kernel"].strip("_").removesuffix("_kernel"), str(programs), str(row["occupancy"])]
        cells += [str(code["registers"]), f"{code['shared'] / 1024:.0f}", " ".join(code["matrix"])]
        rows.append(cells)
    headings = ["op", "tokens", "limit at 3.35 TB/s, µs", "limit at 3.0 TB/s, µs", "kernel", "CTAs", "CTAs per SM"]
    headings += ["registers per thread", "shared memory per CTA, KiB", "matrix instruction"]
    note = f"Triton {compiled['triton']} compiled these kernels on {compiled['date']}. No figure here was measured."
    return f"{note}\n\n{markdown(headings, rows)}"


def planned(compiled: list[dict[str, Any]]) -> str:
    """A decode step of Qwen2.5-3B on an H100, op by op; then its targets, its prediction and its measurement."""
    config = Config.from_name("qwen2.5-3b")
    headings = ["launches", "MB from memory", "MB through L2", "MB requested early", "latency, µs"]
    headings += ["predicted µs", "measured µs"]
    tables, steps = [], []
    for sequences, context, share in plan.TARGETS:
        parts = plan.step(config, sequences, context, compiled)
        paper, took = plan.on_paper(parts, sequences), measured(sequences, context)
        if context == 1024:
            rows = [_part(part, took) for part in parts]
            title = f"op, {sequences} sequence{'s' * (sequences > 1)} of {context:,} tokens"
            tables.append(markdown([title, *headings], rows))
        cells = [str(sequences), f"{context:,}", f"{paper:.0f}", f"{share * paper:.0f} ({share:.0%})"]
        cells += [str(sum(part.launches for part in parts)), f"{plan.tokens_per_second(parts, sequences):.0f}"]
        steps.append([*cells, f"{sequences / sum(took.values()):.0f}" if took else "not yet measured"])
    heads = ["sequences", "context", "tokens/s at 3.35 TB/s", "target, tokens/s", "graph nodes", "predicted tokens/s"]
    return "\n\n".join([*tables, markdown([*heads, "measured tokens/s"], steps)])


def planned_quantised(compiled: list[dict[str, Any]], quantize: Sequence[str] = plan.WEIGHTS) -> str:
    """The same step with quantised weights and with bfloat16 weights; and the two widest shapes by themselves."""
    config = Config.from_name("qwen2.5-3b")
    heads = ["op", "weights", "MB from memory", "MB through L2", "instructions, µs", "latency, µs", "predicted µs"]
    heads += ["predicted µs in bfloat16", "ratio"]
    tables, steps = [], []
    for form in quantize:
        formats = plan.formats(form) | {"torch's kernels": ""}
        for sequences, context, _ in plan.TARGETS:
            parts = plan.step(config, sequences, context, compiled, form)
            dense = plan.step(config, sequences, context, compiled)
            rows = [_beside(part, other, formats[part.op]) for part, other in zip(parts, dense, strict=True)]
            if context == 1024:
                title = f"{form}, {sequences} sequence{'s' * (sequences > 1)} of {context:,} tokens"
                tables.append(markdown([title, *heads[1:]], rows))
            half = plan.step(config, sequences, context, compiled, form, plan.RATE / 2)
            speeds = [plan.tokens_per_second(each, sequences) for each in (parts, half, dense)]
            cells = [form, str(sequences), f"{context:,}", f"{plan.on_paper(parts, sequences):.0f}"]
            steps.append([*cells, *(f"{each:.0f}" for each in speeds), f"{speeds[0] / speeds[-1]:.2f}"])
    first = ["weights", "sequences", "context", "tokens/s at 3.35 TB/s", "predicted tokens/s"]
    first += ["at half the rate of instructions", "predicted tokens/s in bfloat16", "ratio"]
    summary = markdown(first, steps)
    return "\n\n".join([summary, *tables])


def _beside(part: plan.Part, dense: plan.Part, form: str) -> list[str]:
    moved = [f"{each / 1e6:.1f}" if each else "" for each in (part.bytes, part.loaded)]
    times = [part.issue, part.latency, part.seconds, dense.seconds]
    ratio = f"{dense.seconds / part.seconds:.2f}"
    return [part.op, form, *moved, *(f"{each * 1e6:.1f}" if each else "" for each in times), ratio]


def _part(part: plan.Part, took: dict[str, float]) -> list[str]:
    """A row of the plan. ``took`` has the measured seconds of each part of the step."""
    moved = [f"{each / 1e6:.1f}" if each else "" for each in (part.bytes, part.loaded, part.early)]
    times = [part.latency, part.seconds, took.get(part.op, 0.0)]
    return [part.op, str(part.launches), *moved, *(f"{each * 1e6:.1f}" if each else "" for each in times)]


MEASURED = {"combine": "decode_attention", "lm_head": "lm_head_top_k", "top_k": "lm_head_top_k"}  # names of the plan
MEASURED |= {"torch's own kernels": "torch's kernels"}


def measured(sequences: int, context: int) -> dict[str, float]:
    """Seconds of each part of that decode step on the H100, by the names of the plan (`qwenkern bench --where`)."""
    file = RESULTS / "nvidia-h100-80gb-hbm3" / "where.json"
    found: dict[str, float] = {}
    for row in json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []:
        if (row["sequences"], row["context"]) == (sequences, context):
            name = MEASURED.get(row["name"], row["name"])
            found[name] = found.get(name, 0.0) + row["seconds"]
    return found


def kernels(document: dict[str, Any]) -> str:
    """The time of each op, its share of the measured roofline, and its speed-up over each other provider."""
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
    headings = ["op", "tokens", "µs", "roofline, µs", "% of roofline"]
    headings += [f"speed-up over {PROVIDERS.get(name, name)}" for name in others]
    return f"{_when(document)}\n\n{markdown(headings, rows)}"


def _ratio(row: dict[str, Any] | None) -> str:
    if not row or not row["seconds"]:
        return ""
    return f"{row['ratio']['p50']:.2f}" + ("" if row["same"] else " *")


# The names in the tables of providers and engines whose names in the results need an explanation.
PROVIDERS = {
    "eager": "eager torch",
    "compile": "torch.compile",
    "sdpa": "SDPA without pages",
    "library": "the matrix product only",
}
ENGINES = {
    "bfloat16": "qwenkern, bfloat16",
    "patched": "transformers with qwenkern's kernels",
    "liger": "transformers with Liger's kernels",
    "compiled": "transformers, torch.compile",
    "llama.cpp": "llama.cpp, bfloat16",
    "llama.cpp file": "llama.cpp, quantised file",
}
Shown = tuple[str, list[str], list[list[str]]]  # a line above, headings, cells


def end_to_end(document: dict[str, Any]) -> Shown:
    """The speed of each engine, its share of the limits, and the speed-up over it, also if that is below 1."""
    rows = []
    for row in document["rows"]:
        cells = [str(row["batch"]), str(row["prompt"]), ENGINES.get(row["engine"], row["engine"])]
        if "error" in row:
            rows.append([*cells, "failed", *[""] * 5])
            continue
        for rate, share, speedup in (
            ("prompt_tokens_per_second", "of_peak", "prompt_speedup"),
            ("tokens_per_second", "of_bandwidth", "decode_speedup"),
        ):
            cells += [f"{row[rate]:.1f}", f"{row[share]:.0%}" if share in row else "", _spread(row.get(speedup), "")]
        rows.append(cells)
    headings = ["sequences", "prompt tokens", "engine", "prefill tokens/s", "% of multiply-add peak"]
    headings += ["prefill speed-up", "decode tokens/s", "% of bandwidth limit", "decode speed-up"]
    said = _whole_model(document)
    if limits := document.get("roofline"):
        products = {"float32": limits["float32"], "bfloat16": limits["bfloat16"]}
        peaks = " and ".join(f"{each[0] / 1e9:.0f} GFLOP/s in {name}" for name, each in products.items() if each[0])
        bandwidth = _spread(limits["bandwidth"], " GB/s", 1e9, 0)
        said += f" Measured limits: memory bandwidth {bandwidth}, multiply-adds {peaks}."
    return said, headings, rows


def quality(document: dict[str, Any]) -> Shown:
    """The cost of rounding weights, activations and the cache, for each case of quality.py."""
    headings = ["weights", "activations", "cache", "mean KL, arithmetic", "same token", "mean KL, whole", "same token"]
    rows = []
    for row in document["rows"]:
        cells = [{"stored": "as the file is"}.get(row["weights"], row["weights"]), row["dtype"], row["cache"]]
        for part in (row["arithmetic"], row["whole"]):
            cells += [f"{part['kl']:.1e}", f"{part['same']:.1%}"]
        rows.append(cells)
    layers = f", {document['layers']} layers" if document.get("layers") else ""
    return f"{document['model']}{layers}, {document['tokens']} tokens. {_when(document)}", headings, rows


# The engines of the summary. "patched" is not among them: it runs qwenkern's own kernels.
IN_SUMMARY = ("transformers", "compiled", "llama.cpp", "llama.cpp file")


def summary(devices: list[list[dict[str, Any]]]) -> str:
    """One row for each device and size: the speed of qwenkern, and its speed-up over each other engine.

    The first result of a device has the rows; the others of that device add engines to them."""
    rows = []
    for first, *others in devices:
        target = f", {first['target']}" if first.get("target") else ""
        weights = f", {_weights(first)}" if first.get("quantize") else ""
        device = f"{first['model']}{weights}, {first['device']}{target}, {first['date']}"
        for mine in first["rows"]:
            if mine["engine"] == "qwenkern" and "error" not in mine:
                size = (mine["batch"], mine["prompt"])
                found = [row for document in (first, *others) for row in document["rows"]]
                speedups = {row["engine"]: _both(row) for row in found if (row["batch"], row["prompt"]) == size}
                cells = [device, *map(str, size), f"{mine['tokens_per_second']:.1f}", f"{mine['of_bandwidth']:.0%}"]
                rows.append([*cells, *(speedups.get(name, "") for name in IN_SUMMARY)])
                device = ""
    headings = ["model, device, date", "sequences", "prompt tokens", "decode tokens/s", "% of bandwidth limit"]
    return markdown(headings + [f"speed-up over {ENGINES.get(name, name)}" for name in IN_SUMMARY], rows)


def _both(row: dict[str, Any]) -> str:
    """The median speed-up of decoding and that of the prompt."""
    decode, prompt = row.get("decode_speedup"), row.get("prompt_speedup")
    return f"{decode[0]:.2f} / {prompt[0]:.2f}" if decode and prompt else "failed"


def contention(document: dict[str, Any]) -> Shown:
    """Decoding with busy processes, or in two processes at once."""
    count = document.get("busy")
    beside = f"with {count} busy process{'es' if count > 1 else ''}" if count else "two processes at once"
    rows = []
    for row in document["rows"]:
        speeds = [_spread(row[name], "", digits=1) for name in ("calm_tokens_per_second", "tokens_per_second")]
        engine, _, process = row["engine"].partition(",")
        shares = _spread([100 * share for share in row["share"]], " %", digits=0)
        rows.append([ENGINES.get(engine, engine) + (process and f",{process}"), *speeds, shares])
    headings = ["engine", "idle machine, tokens/s", f"{beside}, tokens/s", "% of speed on the idle machine"]
    return _whole_model(document), headings, rows


def serving(document: dict[str, Any]) -> Shown:
    """Many callers at once."""
    rows = []
    for row in document["rows"]:
        waits = [f"{row[f'{what}_p50'][0]:.2f} / {row[f'{what}_p99'][0]:.2f}" for what in ("first_token", "gap")]
        speed = _spread(row["tokens_per_second"], "", digits=1)
        name = ENGINES.get(row["engine"], row["engine"])
        rows.append([str(row["callers"]), name, speed, _spread(row.get("speedup"), ""), *waits])
    requests = f"{document['requests']} request{'s' if document['requests'] > 1 else ''} of each caller"
    said = f"{document['model']}, {requests}. {_when(document)}{_note(document)}"
    waits_of = [f"{what}, median / 99 % within, s" for what in ("time to first token", "gap between tokens")]
    return said, ["callers", "engine", "tokens/s of all", "speed-up", *waits_of], rows


def structured(document: dict[str, Any]) -> Shown:
    """The cost of structured output."""
    rows = []
    for row in document["rows"]:
        times = [_spread(row[name], "", digits=1) for name in ("free_ms", "schema_ms")]
        rows.append([str(row["sequences"]), row["case"], *times, _spread(row["ratio"], "", digits=3)])
    headings = ["sequences", "tokens", "free text, ms a step", "JSON schema, ms a step", "times as long"]
    return f"{document['model']}. {_when(document)}{_note(document)}", headings, rows


def engine(document: dict[str, Any]) -> Shown:
    """The savings and costs of the engine."""
    rows = [[f"speculation: {row['case']}", f"{_spread(row['speedup'], '')} x"] for row in document["rows"]]
    turns, gaps = document["next_turn"], document["gap"]
    rows.append(
        [
            f"first token after {turns['tokens']:,} tokens, then of the next turn",
            f"{turns['first_turn']:.2f} s, {turns['second_turn']:.2f} s ({turns['share']:.1%})",
        ]
    )
    rows.append(
        [
            f"longest gap of a stream while {gaps['prompt']:,} tokens are read for another caller",
            f"{gaps['longest']:.2f} s",
        ]
    )
    rows += [
        [f"own work of a step: {case.replace(', 0 wait', '')} sequences", f"{value:.2f} ms"]
        for case, value in document["own_work"].items()
    ]
    return f"{document['model']}. {_when(document)}", ["what", "measured"], rows


def _note(document: dict[str, Any]) -> str:
    """What was stored with --note, as a sentence."""
    return f" {document['note'].rstrip('.')}." if document.get("note") else ""


def _spread(values: list[float] | None, unit: str, over: float = 1.0, digits: int = 2) -> str:
    """Median (least to most)."""
    if not values:
        return ""
    middle, least, most = (f"{value / over:.{digits}f}" for value in values)
    return f"{middle}{unit} ({least} to {most})"


def _whole_model(document: dict[str, Any]) -> str:
    said = f"{document['model']}, {_weights(document)}. {_when(document)}"
    if document.get("target"):
        said += f" C backend compiled for {document['target']}."
    programs = document.get("programs", {}).values()
    builds = {f"build {each.get('build_number')}, {' '.join(each['flags'])}" for each in programs}
    said += "".join(f" llama.cpp: {build}." for build in sorted(builds))
    said += _note(document)
    if "load_before" in document:
        said += f" Load average before the run: {document['load_before']:.1f}."
    return said


def _weights(document: dict[str, Any]) -> str:
    """The format of qwenkern's weights, in words."""
    form = document.get("quantize", "")
    return {"": "bfloat16", "stored": "quantised as its file is"}.get(form, form)


def shown(make: Callable[[dict[str, Any]], Shown]) -> Callable[[dict[str, Any]], str]:
    """Makes the text for a document from such a table."""

    def text(document: dict[str, Any]) -> str:
        said, headings, rows = make(document)
        return f"{said}\n\n{markdown(headings, rows)}"

    return text


def _when(document: dict[str, Any]) -> str:
    versions = f"torch {document['torch']}, triton {document['triton']}"
    commit = f", commit {document['commit']}" if document.get("commit") else ""
    return f"{document['device']}, {versions}, {document['date']}{commit}."


# By the name of a block: the function that makes a table of one result, and the files of the results.
MAKERS = {
    "kernels": (kernels, "*/kernels*.json"),
    "end_to_end": (shown(end_to_end), "*/end_to_end.json"),
    "end_to_end_more": (shown(end_to_end), "*/end_to_end_*.json"),
    "quantised": (shown(end_to_end), "*/quantised*.json"),
    "quality": (shown(quality), "*/quality*.json"),
    "serving": (shown(serving), "*/serving*.json"),
    "engine": (shown(engine), "*/engine*.json"),
    "structured": (shown(structured), "*/structured*.json"),
    "contention": (shown(contention), "*/contention*.json"),
}
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks() -> Iterator[tuple[str, str]]:
    """The name of every table, and its text."""
    compiled = plan.COMPILED
    if compiled.exists():
        yield "predicted", predicted(json.loads(compiled.read_text(encoding="utf-8")))
        yield "plan", planned(plan.load())
        yield "plan_quantised", planned_quantised(plan.load())
    folders = sorted(file.parent for file in RESULTS.glob("*/end_to_end.json"))
    files = [[file] for file in sorted(RESULTS.glob("*/quantised*.json"))]  # first, because most people run these
    files += [[folder / "end_to_end.json", *sorted(folder.glob("end_to_end_*.json"))] for folder in folders]
    yield "summary", summary([[json.loads(file.read_text(encoding="utf-8")) for file in each] for each in files])
    for name, (make, pattern) in MAKERS.items():
        parts = [make(json.loads(file.read_text(encoding="utf-8"))) for file in sorted(RESULTS.glob(pattern))]
        yield name, "\n\n".join(parts) or "Not yet measured."


def fill(text: str, name: str, content: str) -> str:
    """The text, with ``content`` between the markers of a name."""
    pattern = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.S)
    return pattern.sub(lambda found: f"{found[1]}{content}\n{found[2]}", text)


def main() -> None:
    found = dict(blocks())
    for document in DOCUMENTS:
        text = before = document.read_text(encoding="utf-8")
        for name, content in found.items():
            text = fill(text, name, content)
        if text != before:
            document.write_text(text, encoding="utf-8")
            print(f"wrote {document.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
