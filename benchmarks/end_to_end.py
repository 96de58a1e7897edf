"""Time to the first token and tokens a second of a whole model, beside transformers on the same weights in one run.

    python benchmarks/end_to_end.py                                   the demo model on a CPU
    python benchmarks/end_to_end.py --model qwen2.5-3b                random weights; on a GPU where there is one
    python benchmarks/end_to_end.py --batch 1,16 --prompt-tokens 128,4096 --json FILE

All take turns, on the weights that qwenkern holds: transformers looks at the same memory, as it is, with our pieces or
Liger's, or compiled; llama.cpp reads them in bfloat16 from a GGUF file made of them, or (`llama.cpp file`) the
quantised GGUF file that the model came from. A decode rate is what more tokens cost more: (time of n + 1 tokens - time
of 1 token) / n. The floor reads every weight, and the cached keys and values, at the bandwidth that a copy reaches in
the same run.
"""

from __future__ import annotations

import contextlib
import importlib
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from qwenkern import Config, Model, sources
from qwenkern.benchmarks import peers, results
from qwenkern.benchmarks.run import numbers
from qwenkern.benchmarks.timing import ceilings, circumstances
from qwenkern.config import FAMILY


def llama_cpp_on(model: Model, room: int) -> peers.Generate:
    """llama.cpp on a bfloat16 copy of the model's weights. It maps the file, which may therefore be gone by name."""
    importlib.import_module("llama_cpp")  # before a file of gigabytes is written in vain
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.gguf")
        peers.write_gguf(model, file)
        return peers.llama_cpp(file, room)


def seconds(generate: peers.Generate, prompts: list[list[int]], count: int) -> float:
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    started = time.perf_counter()
    generate(prompts, count)
    synchronize()
    return time.perf_counter() - started


def measure(
    engines: dict[str, peers.Generate], vocabulary: int, batch: int, prompt: int, new: int, repeats: int
) -> dict[str, dict[str, Any]]:
    """Seconds to the first token and tokens a second of each engine, read in turns; a ratio is ours over theirs, taken
    within a round. An engine that fails is reported and left out."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, vocabulary, (batch, prompt), generator=generator).tolist()
    firsts: dict[str, list[float]] = {name: [] for name in engines}
    rates: dict[str, list[float]] = {name: [] for name in engines}
    failed: dict[str, str] = {}
    for turn in range(repeats + 1):
        for name, generate in engines.items():
            if name in failed:
                continue
            try:
                first, all_of_them = seconds(generate, prompts, 1), seconds(generate, prompts, new + 1)
            except Exception as error:  # a peer that cannot do this is a result
                failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                continue
            if turn:  # the first one warms up
                firsts[name].append(first)
                rates[name].append(batch * new / max(all_of_them - first, 1e-9))
    mine = next(iter(engines))
    found: dict[str, dict[str, Any]] = {name: {"error": error} for name, error in failed.items()}
    for name in engines.keys() - failed.keys():
        speedup = [a / b for a, b in zip(rates[mine], rates[name], strict=True)] if rates[mine] else []
        sooner = [b / a for a, b in zip(firsts[mine], firsts[name], strict=True)] if firsts[mine] else []
        found[name] = {
            "first_token_seconds": statistics.median(firsts[name]),
            "tokens_per_second": statistics.median(rates[name]),
            "ours_sooner": _range(sooner),
            "ours_faster": _range(speedup),
        }
    return {name: found[name] for name in engines}


def _range(ratios: list[float]) -> list[float]:
    """Median, least and most."""
    return [statistics.median(ratios), min(ratios), max(ratios)] if ratios else []


def step_bytes(config: Config, batch: int, context: int, itemsize: int) -> int:
    """What a decode step must read: every weight but the embedding's other rows, and the cache."""
    weights = config.num_parameters - (0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size)
    return itemsize * weights + batch * context * config.kv_bytes_per_token(itemsize)


def main(
    model: Annotated[
        str, typer.Option(help="What `generate` takes, or a size of the family (random weights).")
    ] = "demo",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    batch: Annotated[str, typer.Option(help="Sequences at once.")] = "1",
    prompt_tokens: Annotated[str, typer.Option(help="Tokens of each prompt.")] = "128",
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate after the first.")] = 32,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    layers: Annotated[int, typer.Option(help="Fewer layers than the size has; only with random weights.")] = 0,
    beside: Annotated[
        str,
        typer.Option(
            "--peers",
            help="With commas: transformers, patched (by us), liger, compiled, llama.cpp, 'llama.cpp file'.",
        ),
    ] = "",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result there.")] = None,
) -> None:
    """Time a whole model beside transformers."""
    place = torch.device("cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu"))
    batches, prompts = numbers(batch), numbers(prompt_tokens)
    room = max(batches) * (max(prompts) + new_tokens + 64)
    started = time.perf_counter()
    if model.lower() in FAMILY:
        config = Config.from_name(model)
        if layers:
            config = Config(**{**_fields(config), "num_hidden_layers": layers})
        loaded = Model.from_config(config, device=place, dtype="bfloat16", cache_tokens=room)
    else:
        loaded = Model.from_pretrained(model, device=place, dtype="bfloat16", cache_tokens=room)
    load, config = time.perf_counter() - started, loaded.config
    file = None if model.lower() in FAMILY else sources.resolve(model)
    makers: dict[str, Callable[[], peers.Generate]] = {
        "transformers": lambda: peers.transformers(loaded),
        "patched": lambda: peers.transformers(loaded, change=peers.patched),
        "liger": lambda: peers.transformers(loaded, change=peers.with_liger),
        "compiled": lambda: peers.transformers(loaded, static=True),
        "llama.cpp": lambda: llama_cpp_on(loaded, room),
        "llama.cpp file": lambda: peers.llama_cpp(file, room),
    }
    chosen = beside.split(",") if beside else ["transformers", "compiled" if place.type == "cuda" else "llama.cpp"]
    if unknown := set(chosen) - set(makers):
        raise typer.BadParameter(f"{', '.join(unknown)}: not among {', '.join(makers)}", param_hint="--peers")
    engines: dict[str, peers.Generate] = {"qwenkern": peers.qwenkern(loaded)}
    for name in chosen:
        if name == "llama.cpp file" and (file is None or file.suffix != ".gguf"):
            raise typer.BadParameter("llama.cpp file: the model is no GGUF file", param_hint="--peers")
        with contextlib.suppress(ImportError):
            engines[name] = makers[name]()
    limits, console = ceilings(place), Console(width=None if Console().is_terminal else 140)
    table = Table(title=f"{model}, bfloat16, copy {limits.copy / 1e9:.0f} GB/s", title_justify="left")
    for heading in (
        "batch",
        "prompt",
        "engine",
        "first token s",
        "tokens/s",
        "% of floor",
        "ours faster",
        "ours sooner",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    facts = circumstances(place) | {"model": model, "layers": config.num_hidden_layers, "new_tokens": new_tokens}
    facts |= {
        "load_seconds": load,
        "predicted_gb": (2 * config.num_parameters + room * config.kv_bytes_per_token(2)) / 1e9,
    }
    rows = []
    for count in batches:
        for length in prompts:
            floor = limits.copy / step_bytes(config, count, length + new_tokens // 2, 2) * count
            found = measure(engines, config.vocab_size, count, length, new_tokens, repeats)
            for name, each in found.items():
                rows.append(
                    {"batch": count, "prompt": length, "engine": name, "floor_tokens_per_second": floor, **each}
                )
                table.add_row(str(count), str(length), name, *_cells(each, floor))
            if json_file:  # each time, since a run on a lent machine may be cut off
                peak = torch.cuda.max_memory_allocated() / 1e9 if place.type == "cuda" else 0.0
                ends = {"peak_gb": peak, "ceilings": {"copy": limits.copy, "matrix": limits.matrix}, "rows": rows}
                results.save(json_file, facts | ends)
    console.print(table)
    console.print(f"ready after {load:.1f} s; {facts['predicted_gb']:.1f} GB predicted for weights and cache")
    if place.type == "cuda":
        memory = torch.cuda.max_memory_allocated() / 1e9
        console.print(f"at most {memory:.1f} GB of GPU memory were in use, the peers' included")
    for row in rows:
        if "error" in row:
            console.print(f"[red]failed[/red] {row['engine']}: {row['error']}", soft_wrap=True)
    raise typer.Exit(1 if any(row["engine"] == "qwenkern" and "error" in row for row in rows) else 0)


def _cells(found: dict[str, Any], floor: float) -> list[str]:
    if "error" in found:
        return ["[red]failed[/red]"]
    return [
        f"{found['first_token_seconds']:.3f}",
        f"{found['tokens_per_second']:.1f}",
        f"{found['tokens_per_second'] / floor:.0%}",
        *("{:.2f} ({:.2f}..{:.2f})".format(*found[name]) for name in ("ours_faster", "ours_sooner")),
    ]


def _fields(config: Config) -> dict[str, Any]:
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


if __name__ == "__main__":
    typer.run(main)
