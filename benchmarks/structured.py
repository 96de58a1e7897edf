"""Measures what structured output costs: texts that follow a JSON schema and free texts, alternately.

    python benchmarks/structured.py                    the demo model on a CPU
    python benchmarks/structured.py --json FILE

Both have the same prompts and equally many tokens. The time of a step is the time of a whole call divided by its
tokens; the prompts are in the prefix cache. Without speculation, each step gives each sequence one token, so the times
can be compared. In the last row both have speculation: then it also guesses the text that the schema forces.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from qwenkern import Model, SamplingParams
from qwenkern.benchmarks.ops.timing import circumstances
from qwenkern.benchmarks.reports import results
from qwenkern.cli import terminal

CITY = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 60},
        "country": {"type": "string", "maxLength": 60},
        "population": {"type": "integer"},
        "is_capital": {"type": "boolean"},
    },
    "required": ["name", "country", "population", "is_capital"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": CITY, "minItems": 100}  # the array does not end before the last token
REGIONS = ("Europe", "Asia", "Africa", "South America", "North America", "Oceania", "Scandinavia", "the Alps")
HOW = {
    "greedy": SamplingParams(temperature=0),
    "drawn": SamplingParams(temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05, seed=1),
    "drawn, no top_k": SamplingParams(temperature=1.0, top_p=1.0, top_k=0, repetition_penalty=1.0, seed=1),
}


def prompts(count: int) -> list[list[dict[str, Any]]]:
    said = "List the 100 largest cities of {}: name, country, population, and whether it is a capital. Answer in JSON."
    return [[{"role": "user", "content": said.format(REGIONS[n % len(REGIONS)])}] for n in range(count)]


def step(model: Model, count: int, params: SamplingParams, new: int) -> float:
    """Seconds per step, in texts of ``new`` tokens."""
    params = replace(params, max_tokens=new, ignore_eos=True)
    begin = time.perf_counter()
    found = model.generate(prompts(count), params)
    seconds = time.perf_counter() - begin
    if any(each.num_tokens != new for each in found):
        raise RuntimeError(f"a text has {min(each.num_tokens for each in found)} tokens; expected {new}")
    return seconds / new


def row(model: Model, count: int, how: str, new: int, rounds: int) -> dict[str, Any]:
    """Milliseconds per step without and with the schema, and the ratios within the rounds."""
    kinds = {"free_ms": HOW[how], "schema_ms": replace(HOW[how], json_schema=json.dumps(SCHEMA))}
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for turn in range(rounds + 1):
        for name in sorted(kinds, reverse=turn % 2 == 1):
            seconds = step(model, count, kinds[name], new)
            if turn:  # the first round fills the prefix cache and compiles the grammar
                times[name].append(seconds * 1e3)
    ratios = [formed / free for free, formed in zip(times["free_ms"], times["schema_ms"], strict=True)]
    case = f"{how}, {'with' if model.speculate else 'without'} speculation"
    found = {name: results.middle_and_ends(each) for name, each in (times | {"ratio": ratios}).items()}
    return {"sequences": count, "case": case, **found}


def main(
    model: Annotated[str, typer.Option(help="What `generate` takes.")] = "demo",
    new: Annotated[int, typer.Option("--new-tokens", min=2, max=1000, help="Tokens of each text.")] = 96,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, after one that does not count.")] = 12,
    note: Annotated[str, typer.Option(help="Stored with the result.")] = "",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result there.")] = None,
) -> None:
    """Measure what structured output costs."""
    console, rows = Console(), []
    facts: dict[str, Any] = circumstances(torch.device("cpu")) | {"model": Path(model).name, "note": note}
    plain = Model.from_pretrained(model, device="cpu", cache_tokens=8192, speculate=False)
    fast = Model.from_pretrained(model, device="cpu", cache_tokens=8192)
    for loaded, count, how in [
        *((plain, count, how) for count in (1, 8) for how in HOW),
        *((fast, count, "greedy") for count in (1, 8)),
    ]:
        rows.append(row(loaded, count, how, new, rounds))
        console.print(rows[-1])
    if json_file:
        results.save(json_file, facts | {"rows": rows})


if __name__ == "__main__":
    terminal.run(terminal.command(main))
