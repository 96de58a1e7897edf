"""Measures prefill and decode of a whole model in tokens per second, with other engines on the same weights in one run.

    python benchmarks/end_to_end.py                                   the demo model on a CPU
    python benchmarks/end_to_end.py --model qwen2.5-3b                random weights; on a GPU if there is one
    python benchmarks/end_to_end.py --batch 1,8 --prompt-tokens 128,512 --threads 2 --json FILE
    python benchmarks/end_to_end.py --quantize stored --peers "llama.cpp file"      the quantised file in both engines
    python benchmarks/end_to_end.py --model qwen2.5-3b --quantize int4 --peers bfloat16
    python benchmarks/end_to_end.py --busy 2                          decoding with two busy processes
    python benchmarks/end_to_end.py --twice                           two processes that decode at once

Each round measures the roofline and takes one reading of every engine. Compiled transformers is measured last, in
rounds with qwenkern alone. qwenkern runs in bfloat16, or with --quantize on quantised weights; the others run in
bfloat16. transformers uses the memory of qwenkern's bfloat16 weights: unchanged, with qwenkern's or Liger's kernels, or
compiled. llama.cpp's programs read a bfloat16 GGUF file made of these weights, or (`llama.cpp file`) the quantised GGUF
file that the model came from. Speed-ups and shares are those within a round. A decode step must read every weight and
the cached keys and values, so its limit is the bandwidth of a loop that only reads. The limit of a prompt is the
multiply-add peak.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
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

from qwenkern import Config, Model
from qwenkern.benchmarks import tables
from qwenkern.benchmarks.models import contention, llama_cpp, peers
from qwenkern.benchmarks.models.roofline import Roofline, prompt_operations, roofline, step_bytes
from qwenkern.benchmarks.ops.timing import circumstances
from qwenkern.benchmarks.reports import results
from qwenkern.benchmarks.run import numbers
from qwenkern.cli import terminal
from qwenkern.config import FAMILY
from qwenkern.hub.names import resolve
from qwenkern.kernels.c import build
from qwenkern.kernels.environment import THREADS

PEERS = ("bfloat16", "transformers", "patched", "liger", "compiled", "llama.cpp", "llama.cpp file")
STORED = "stored"  # a value of --quantize: the file's own formats
MISSING = (ImportError, FileNotFoundError)  # raised if a peer is not installed


def measure(
    engines: dict[str, peers.Engine],
    config: Config,
    batch: int,
    prompt: int,
    new: int,
    repeats: int,
    limits: Callable[[], Roofline],
) -> tuple[list[dict[str, Any]], list[Roofline]]:
    """A row for each engine, and the roofline of each round. Each round takes one reading of every engine. A speed-up
    is the speed of the first engine over that of another one. The row of an engine that fails has its error."""
    prompts, failed, found = random_prompts(config, batch, prompt), {}, []
    readings: dict[str, list[peers.Reading]] = {name: [] for name in engines}
    for turn in range(repeats + 1):
        limit = limits()
        for name, engine in engines.items():
            if name in failed:
                continue
            try:
                reading = engine.read(prompts, new)
            except Exception as error:  # the failure of a peer is a result
                failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                continue
            if turn:  # the first round warms up
                readings[name].append(reading)
        if turn:
            found.append(limit)
    operations = prompt_operations(config, batch, prompt)
    mine, rows = next(iter(engines)), []
    for name, engine in engines.items():
        row: dict[str, Any] = {"batch": batch, "prompt": prompt, "engine": name}
        rows.append(row)
        if name in failed:
            row["error"] = failed[name]
            continue
        each = readings[name]
        moved = step_bytes(config, engine.weights, batch, prompt + new // 2) / batch
        row["first_token_seconds"] = statistics.median(reading.first for reading in each)
        row["prompt_tokens_per_second"] = batch * prompt / row["first_token_seconds"]
        row["tokens_per_second"] = statistics.median(reading.rate for reading in each)
        pairs = list(zip(each, found, strict=True))
        row["of_bandwidth"] = statistics.median(reading.rate * moved / limit.bandwidth for reading, limit in pairs)
        if engine.in_16_bits:
            row["of_peak"] = statistics.median(operations / reading.first / limit.peak for reading, limit in pairs)
        if name != mine and mine not in failed:
            both = list(zip(readings[mine], each, strict=True))
            row["prompt_speedup"] = results.middle_and_ends([theirs.first / ours.first for ours, theirs in both])
            row["decode_speedup"] = results.middle_and_ends([ours.rate / theirs.rate for ours, theirs in both])
    return rows, found


def in_turns(names: list[str]) -> list[list[str]]:
    """The engines that share rounds. "compiled" shares rounds with qwenkern alone, after the others: compiling may take
    minutes, and if the run is ended during this time, the others' results are already kept."""
    quick = [name for name in names if name != "compiled"]
    return [quick, [names[0], "compiled"]] if "compiled" in names else [quick]


def random_prompts(config: Config, batch: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, config.vocab_size, (batch, length), generator=generator).tolist()


def load(model: str, device: torch.device, layers: int, room: int, quantize: str = "") -> Model:
    """The model in bfloat16, or with ``quantize`` on quantised weights with the default dtypes. The name of a size of
    the family gives random weights, with ``layers`` layers if not 0. The model has no prefix cache, because readings
    repeat their prompts and each must compute all tokens."""
    how: dict[str, Any] = {"prefix_cache": False, "speculate": False}
    how |= {"quantize": None if quantize == STORED else quantize} if quantize else {"dtype": "bfloat16"}
    if model.lower() not in FAMILY:
        how |= {} if quantize else {"quantize": "none"}
        return Model.from_pretrained(model, device=device, cache_tokens=room, **how)
    config = Config.from_name(model)
    if layers:
        fields = {name: getattr(config, name) for name in config.__dataclass_fields__}
        config = Config(**fields | {"num_hidden_layers": layers})
    return Model.from_config(config, device=device, cache_tokens=room, **how)


def make(
    name: str, loaded: Model, dense: Callable[[], Model], file: Path | None, folder: Path, threads: int
) -> peers.Engine:
    """The engine of a name. ``dense`` returns the model in bfloat16. Writes llama.cpp's bfloat16 file to ``folder``.
    Raises one of MISSING."""
    if name == "qwenkern":
        return peers.qwenkern(loaded)
    if name == "bfloat16":
        return peers.qwenkern(dense())
    if name.startswith("llama.cpp"):
        llama_cpp.find("llama-bench")  # raises before a file of gigabytes is written in vain
        if name == "llama.cpp":
            peers.write_gguf(dense(), file := folder / "model.gguf")
        assert file
        return peers.llama_cpp(file, threads)
    changes = {"patched": peers.patched, "liger": peers.with_liger}
    return peers.transformers(dense(), name == "compiled", changes.get(name, lambda peer: peer))


def decoder(name: str, model: str, layers: int, threads: int, prompt: int, new: int, quantize: str) -> contention.Rate:
    """Measures the decode rate of one sequence on a CPU, in a process that does nothing else."""
    use(threads)
    loaded = load(model, torch.device("cpu"), layers, prompt + new + 64, quantize if name == "qwenkern" else "")
    return rate(make(name, loaded, lambda: loaded, None, Path(), threads), loaded.config, prompt, new)


def rate(engine: peers.Engine, config: Config, prompt: int, new: int) -> contention.Rate:
    prompts = random_prompts(config, 1, prompt)
    return lambda: engine.read(prompts, new).rate


def use(threads: int) -> None:
    """Sets the number of threads of qwenkern, of torch, and of the processes that this one starts."""
    os.environ[THREADS.name] = str(threads)
    torch.set_num_threads(threads)


def main(
    model: Annotated[
        str, typer.Option(help="What `generate` takes, or a size of the family (random weights).")
    ] = "demo",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    batch: Annotated[str, typer.Option(help="Sequences at once, with commas.")] = "1",
    prompt_tokens: Annotated[str, typer.Option(help="Tokens of each prompt, with commas.")] = "128",
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate after the first.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds, after one that does not count.")] = 5,
    layers: Annotated[int, typer.Option(help="Number of layers, with random weights; 0: those of the size.")] = 0,
    threads: Annotated[int, typer.Option(min=0, help="Threads of each engine on a CPU; 0: as many as torch uses.")] = 0,
    beside: Annotated[str, typer.Option("--peers", help=f"Of {', '.join(PEERS)}, with commas.")] = "",
    quantize: Annotated[
        str, typer.Option(help="Run qwenkern on quantised weights: stored (as the file is), int8, int4 or fp8.")
    ] = "",
    busy: Annotated[int, typer.Option(min=0, help="Decode on the idle machine, then with so many busy processes.")] = 0,
    twice: Annotated[bool, typer.Option("--twice", help="Decode in one process, then in two at once.")] = False,
    note: Annotated[str, typer.Option(help="Stored with the result, for example how llama.cpp was built.")] = "",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result there.")] = None,
) -> None:
    """Time a whole model and other engines."""
    place = torch.device("cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu"))
    batches, prompts = numbers(batch), numbers(prompt_tokens)
    console = Console(width=None if Console().is_terminal else 172)
    file = None if model.lower() in FAMILY else resolve(model)
    names = beside.split(",") if beside else ["transformers", "compiled"] + ["llama.cpp"] * (place.type == "cpu")
    if unknown := set(names) - set(PEERS):
        raise typer.BadParameter(f"{', '.join(unknown)}: not among {', '.join(PEERS)}", param_hint="--peers")
    if "llama.cpp file" in names and (file is None or file.suffix != ".gguf"):
        raise typer.BadParameter("llama.cpp file: the model is not a GGUF file", param_hint="--peers")
    if (busy or twice) and (place.type != "cpu" or (busy and twice) or batches != [1] or len(prompts) > 1):
        raise typer.BadParameter(
            "--busy, --twice: expected one of them, on a CPU, with one sequence and one prompt length"
        )
    threads = threads or torch.get_num_threads()
    use(threads)
    facts: dict[str, Any] = circumstances(place) | {"model": Path(model).name, "new_tokens": new_tokens, "note": note}
    if place.type == "cpu":
        facts |= {"threads": threads, "target": build.target() or "none", "load_before": os.getloadavg()[0]}
    room = max(batches) * (max(prompts) + new_tokens + 64)
    started = time.perf_counter()
    loaded = load(model, place, layers, room, quantize)
    dense = functools.cache(lambda: load(model, place, layers, room) if quantize else loaded)
    facts |= {"load_seconds": time.perf_counter() - started, "layers": loaded.config.num_hidden_layers}
    facts |= {"quantize": quantize, "dtype": str(loaded.dtype).removeprefix("torch.")}
    parameters = sum(each.nbytes for each in loaded.module.parameters())
    facts["predicted_gb"] = (parameters + room * loaded.config.kv_bytes_per_token(2)) / 1e9
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        engines: dict[str, peers.Engine] = {}
        for name in ["qwenkern", *names]:
            try:
                engines[name] = make(name, loaded, dense, file, folder, threads)
            except MISSING as error:
                console.print(f"[yellow]left out[/yellow] {name}: {error}", soft_wrap=True)
        facts["programs"] = {name: each.facts for name, each in engines.items() if each.facts}
        rates = {name: rate(each, loaded.config, prompts[0], new_tokens) for name, each in engines.items()}
        if busy:
            document = facts | {"busy": busy, "rows": contention.calm_and_busy(rates, busy, repeats)}
        elif twice:
            pairs: dict[str, tuple[contention.Rate, contention.Rate]] = {}
            for name, read in rates.items():
                given = (decoder, name, model, layers, threads, prompts[0], new_tokens, quantize)
                if name.startswith("llama.cpp"):  # each of its readings is a process anyway
                    pairs[name] = (read, read)
                else:
                    first, second = (stack.enter_context(contention.process(*given)) for _ in range(2))
                    pairs[name] = (first, second)
            document = facts | {"twice": True, "rows": contention.alone_and_together(pairs, repeats)}
        else:
            rows: list[dict[str, Any]] = []
            limits: list[Any] = []
            for together, count, length in itertools.product(in_turns(list(engines)), batches, prompts):
                chosen = {name: engines[name] for name in together}
                found, rounds = measure(
                    chosen, loaded.config, count, length, new_tokens, repeats, lambda: roofline(place, threads)
                )
                known = {(row["engine"], row["batch"], row["prompt"]) for row in rows}
                rows += [row for row in found if (row["engine"], row["batch"], row["prompt"]) not in known]
                limits += rounds
                document = facts | {"peak_gb": _peak_gb(place), "roofline": spreads(limits), "rows": rows}
                if json_file:  # after each size, because the run may be interrupted
                    results.save(json_file, document)
    if json_file:
        results.save(json_file, document)
    _print(console, document)
    failed = {row["engine"] for row in document["rows"] if "error" in row}
    raise typer.Exit(1 if "qwenkern" in failed else 0)


def _print(console: Console, document: dict[str, Any]) -> None:
    title, headings, cells = (tables.end_to_end if "roofline" in document else tables.contention)(document)
    table = Table(title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=heading == "engine")
    for each in cells:
        table.add_row(*each)
    console.print(table)
    predicted = f"{document['predicted_gb']:.1f} GB predicted for weights and cache"
    console.print(f"ready after {document['load_seconds']:.1f} s; {predicted}")
    if document.get("peak_gb"):
        console.print(f"{document['peak_gb']:.1f} GB of GPU memory were in use at most, with the peers'")
    for row in document["rows"]:
        if "error" in row:
            console.print(f"[red]failed[/red] {row['engine']}: {row['error']}", soft_wrap=True)


def _peak_gb(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0


def spreads(limits: list[Roofline]) -> dict[str, list[float]]:
    """The median, the smallest and the largest value of each limit."""
    return {
        name: results.middle_and_ends([getattr(limit, name) for limit in limits])
        for name in ("bandwidth", "float32", "bfloat16")
    }


if __name__ == "__main__":
    terminal.run(terminal.command(main))
