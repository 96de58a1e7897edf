"""Measures many callers at once: the tokens per second of all, and the waits of each, with other engines in one run.

    python benchmarks/serving.py                                                     the demo model on a CPU
    python benchmarks/serving.py --peers "qwenkern serve,llama.cpp server" --callers 1,4,16,64 --json FILE
    python benchmarks/serving.py --model qwen2.5-3b --device cuda --peers "qwenkern serve,transformers"

Each caller sends a request, reads its tokens as they arrive, and then sends the next request. The callers begin one
after the other. Prompts and answers have random lengths, the same for every engine. The tokens are random and differ
between rounds, so that no engine has a prompt in its prefix cache. Each round runs every engine once. "qwenkern" is the
engine called directly; `qwenkern serve` and llama.cpp's server answer over HTTP on loopback, each in a process of its
own, from the same file; transformers runs its continuous batching on the same weights in bfloat16. The name of a size
of the family gives random weights in bfloat16. On a GPU, every engine first runs a round that does not count, in which
it compiles and captures.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from qwenkern import Model
from qwenkern.benchmarks.end_to_end import MISSING, use
from qwenkern.benchmarks.models import services
from qwenkern.benchmarks.models.random_server import random_model
from qwenkern.benchmarks.ops.timing import circumstances
from qwenkern.benchmarks.reports import results
from qwenkern.cli import terminal
from qwenkern.config import FAMILY
from qwenkern.hub.names import resolve

PEERS = ("qwenkern serve", "llama.cpp server", "transformers")
PROMPTS, ANSWERS = (64, 1024), (16, 256)  # tokens, the least and the most
TOKENS = PROMPTS[1] + ANSWERS[1]  # the most tokens of a request
Maker = Callable[[int], AbstractContextManager[services.Service]]
STAGGER = 0.25  # seconds between the first requests of two callers


@dataclass(frozen=True)
class Ask:
    prompt: list[int]
    new: int  # tokens of the answer


@dataclass(frozen=True)
class Timed:
    """When a request was sent and when its tokens came, in seconds."""

    sent: float
    tokens: list[float]


def workload(callers: int, requests: int, vocabulary: int, seed: int = 0) -> list[list[Ask]]:
    """The requests of each caller."""
    choose = random.Random(seed)

    def ask() -> Ask:
        length, new = choose.randint(*PROMPTS), choose.randint(*ANSWERS)
        return Ask([choose.randrange(vocabulary) for _ in range(length)], new)

    return [[ask() for _ in range(requests)] for _ in range(callers)]


def serve(service: services.Service, work: list[list[Ask]], stagger: float = STAGGER) -> list[Timed]:
    """Runs all callers, in one thread. Raises the first error."""
    found: list[Timed] = []
    started = time.perf_counter()

    async def caller(index: int) -> None:
        await asyncio.sleep(index * stagger)
        for ask in work[index]:
            timed = Timed(time.perf_counter() - started, [])
            async for count in service.stream(ask.prompt, ask.new):
                timed.tokens.extend([time.perf_counter() - started] * count)
            if len(timed.tokens) != ask.new:
                raise RuntimeError(f"a request for {ask.new} tokens got {len(timed.tokens)}")
            found.append(timed)

    async def callers() -> None:
        await asyncio.gather(*(caller(index) for index in range(len(work))))

    asyncio.run(callers())
    return found


def figures(found: list[Timed], work: list[list[Ask]]) -> dict[str, float]:
    """The figures of a run: tokens per second of all callers, and the median and 99th percentile of two waits, in
    seconds."""
    seconds = max(each.tokens[-1] for each in found)
    firsts = [each.tokens[0] - each.sent for each in found]
    gaps = [after - before for each in found for before, after in zip(each.tokens, each.tokens[1:], strict=False)]
    prompts = sum(len(ask.prompt) for asks in work for ask in asks)
    answers = sum(ask.new for asks in work for ask in asks)
    return {
        "seconds": seconds,
        "tokens_per_second": answers / seconds,
        "all_tokens_per_second": (prompts + answers) / seconds,
        "first_token_p50": statistics.median(firsts),
        "first_token_p99": percentile(firsts, 99),
        "gap_p50": statistics.median(gaps),
        "gap_p99": percentile(gaps, 99),
    }


def summary(readings: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """A row for each engine: the median, the least and the most of each figure, and of the first engine's speed-up over
    this engine, computed within each round."""
    mine, rows = next(iter(readings)), []
    for name, found in readings.items():
        row: dict[str, Any] = {"engine": name}
        row |= {key: results.middle_and_ends([each[key] for each in found]) for key in found[0]}
        if name != mine:
            both = zip(readings[mine], found, strict=True)
            row["speedup"] = results.middle_and_ends([theirs["seconds"] / ours["seconds"] for ours, theirs in both])
        rows.append(row)
    return rows


def percentile(values: list[float], share: int) -> float:
    return sorted(values)[min(len(values) - 1, len(values) * share // 100)]


def main(
    model: Annotated[
        str, typer.Option(help="What `generate` takes, or a size of the family (random weights).")
    ] = "demo",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    callers: Annotated[
        str, typer.Option(help="Callers at once; several numbers, with commas, one after the other.")
    ] = "16",
    requests: Annotated[int, typer.Option(min=1, help="Requests of each caller, one after the other.")] = 2,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; in each, every engine runs once.")] = 2,
    threads: Annotated[int, typer.Option(min=0, help="Threads of each engine; 0: as many as torch uses.")] = 0,
    beside: Annotated[str, typer.Option("--peers", help=f"Of {', '.join(PEERS)}, with commas.")] = "",
    note: Annotated[str, typer.Option(help="Stored with the result.")] = "",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result there.")] = None,
) -> None:
    """Time many callers at once, and other engines."""
    console = Console()
    place = torch.device("cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu"))
    names = [name for name in beside.split(",") if name]
    if unknown := set(names) - set(PEERS):
        raise typer.BadParameter(f"{', '.join(unknown)}: not among {', '.join(PEERS)}", param_hint="--peers")
    counts = numbers(callers)
    threads = threads or torch.get_num_threads()
    use(threads)
    loaded = load(model, place, max(counts) * TOKENS)
    makers = engines(loaded, model, names, threads)
    facts: dict[str, Any] = circumstances(place) | {"model": Path(model).name, "note": note, "threads": threads}
    facts |= {"callers": counts, "requests": requests, "prompts": PROMPTS, "answers": ANSWERS, "stagger": STAGGER}
    rows: list[dict[str, Any]] = []
    for count in counts:
        readings: dict[str, list[dict[str, float]]] = {}
        for repeat in range(repeats):
            work = workload(count, requests, loaded.config.vocab_size - 1000, seed=repeat)
            for name, maker in list(makers.items()):
                try:
                    with maker(count) as service:
                        warm_up(service, work, place)
                        readings.setdefault(name, []).append(figures(serve(service, work), work))
                except MISSING as error:
                    console.print(f"[yellow]left out[/yellow] {name}: {error}", soft_wrap=True)
                    del makers[name]
                    continue
                console.print(f"{count}, {name}", {key: round(value, 3) for key, value in readings[name][-1].items()})
        rows += [{"callers": count} | row for row in summary(readings)]
        for row in rows[-len(readings) :]:
            if "speedup" in row:
                console.print(f"{count}, {row['engine']}: takes {row['speedup'][0]:.3f} times as long as the engine")
    if json_file:
        results.save(json_file, facts | {"rows": rows})


def load(model: str, place: torch.device, cache_tokens: int, **how: Any) -> Model:
    """The model as its server loads it. The name of a size of the family gives random weights in bfloat16."""
    if model.lower() in FAMILY:
        return random_model(model, str(place), cache_tokens)
    return Model.from_pretrained(model, device=place, cache_tokens=cache_tokens, **how)


def warm_up(service: services.Service, work: list[list[Ask]], place: torch.device) -> None:
    """Runs requests that do not count. Their first token differs, so that no later prompt is in a prefix cache."""
    few = [[Ask([7] * 70, 4)]] * 2
    many = [[Ask([0, *ask.prompt[1:]], ask.new) for ask in asks[:1]] for asks in work]
    serve(service, few if place.type == "cpu" else many)


def engines(loaded: Model, model: str, names: list[str], threads: int) -> dict[str, Maker]:
    """For each engine, the function that starts it for a number of callers. Our cache and llama.cpp's hold equally many
    tokens."""
    makers: dict[str, Maker] = {"qwenkern": lambda _: services.qwenkern(loaded)}
    is_random, place = model.lower() in FAMILY, loaded.device.type
    if "qwenkern serve" in names:
        room, server = (
            loaded.cache.num_tokens,
            services.qwenkern_random_server if is_random else services.qwenkern_server,
        )
        makers["qwenkern serve"] = lambda _: server(model, place, threads, room)
    if "llama.cpp server" in names:
        if is_random or place != "cpu":
            raise typer.BadParameter("llama.cpp server: expected a model with a file, on a CPU", param_hint="--peers")
        file = resolve(model)
        makers["llama.cpp server"] = lambda count: services.llama_server(file, threads, count, TOKENS)
    if "transformers" in names:
        dense = loaded if is_random else load(model, loaded.device, 64, quantize="none", dtype="bfloat16")
        makers["transformers"] = lambda _: services.transformers(dense)
    return makers


def numbers(text: str) -> list[int]:
    """Numbers of callers from "1,4,16"."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and 0 < int(part) < 1000 for part in parts):
        raise typer.BadParameter(f"{text!r}; expected numbers from 1 to 999, with commas", param_hint="--callers")
    return [int(part) for part in parts]


if __name__ == "__main__":
    terminal.run(terminal.command(main))
