"""Runs many kinds of requests against one model for a long time, and watches its memory.

    python benchmarks/soak.py --minutes 20 --json FILE

Callers in threads generate, stream and stop early, ask for several answers, for JSON and for log-probabilities, and
continue conversations. After each period all pages must be free or in the prefix cache, and the memory of the process
is read. The first third of the run warms up; after that the memory should not grow.
"""

from __future__ import annotations

import random
import statistics
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer
from rich.console import Console

from qwenkern import Model
from qwenkern.benchmarks.ops.timing import circumstances
from qwenkern.benchmarks.reports import results
from qwenkern.cli import terminal

SCHEMA = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 20}}, "required": ["name"]}
TEXT = "the quick brown fox jumps over a lazy dog and then reads one more page of an old book"
PERIODS = 30  # the memory is read after each period


def one(model: Model, choose: random.Random) -> str:
    """One request of a random kind. Returns the kind."""
    prompt = " ".join(choose.choices(TEXT.split(), k=choose.choice((5, 60, 400))))
    tokens, kind = choose.randint(1, 48), choose.choice(("text", "leaves", "several", "json", "logprobs", "chat"))
    if kind == "leaves":
        with model.stream(prompt, max_tokens=64) as stream:
            for _ in range(choose.randint(0, 3)):
                next(stream, None)
    elif kind == "several":
        model.generate(prompt, n=3, temperature=1.0, max_tokens=tokens)
    elif kind == "json":
        model.generate(prompt, json_schema=SCHEMA, max_tokens=tokens)
    elif kind == "chat":
        messages: list[dict[str, Any]] = [{"role": "user", "content": prompt}]
        answer = model.chat(messages, max_tokens=tokens).text
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "More?"}]
        model.chat(messages, max_tokens=tokens)
    else:
        model.generate(prompt, max_tokens=tokens, logprobs=5 if kind == "logprobs" else None)
    return kind


def run(model: Model, callers: int, seconds: float, seed: int) -> Counter[str]:
    """Runs callers that send requests until the time is over. Returns the number of requests of each kind."""
    until = time.monotonic() + seconds

    def caller(index: int) -> Counter[str]:
        choose, counts = random.Random(f"{seed}/{index}"), Counter[str]()
        while time.monotonic() < until:
            counts[one(model, choose)] += 1
        return counts

    with ThreadPoolExecutor(callers) as pool:
        return sum(pool.map(caller, range(callers)), Counter())


def main(
    model: Annotated[str, typer.Option(help="What `generate` takes.")] = "demo",
    minutes: Annotated[float, typer.Option(min=0.01, help="How long.")] = 20.0,
    callers: Annotated[int, typer.Option(min=1, help="Callers at once.")] = 8,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result there.")] = None,
) -> None:
    """Watch the memory under many kinds of requests."""
    console, process = Console(), psutil.Process()
    loaded = Model.from_pretrained(model, device="cpu", cache_tokens=8192)  # too few for all: requests are preempted
    counts: Counter[str] = Counter()
    memory: list[int] = []
    for period in range(PERIODS):
        counts += run(loaded, callers, 60 * minutes / PERIODS, period)
        while not loaded._loop.is_idle:  # wait for streams that were stopped early
            time.sleep(0.01)
        if loaded.cache.num_free_pages != loaded.cache.num_pages:
            raise RuntimeError(
                f"{loaded.cache.num_free_pages} of {loaded.cache.num_pages} pages are free, without requests"
            )
        memory.append(process.memory_info().rss)
        console.print(
            f"{(period + 1) * minutes / PERIODS:.1f} min: {memory[-1] / 1e6:.1f} MB, {sum(counts.values())} requests"
        )
    settled = memory[PERIODS // 3 :]
    half = len(settled) // 2
    growth = statistics.mean(settled[half:]) - statistics.mean(settled[:half])
    console.print(f"{sum(counts.values())} requests {counts}; later half against earlier half: {growth / 1e6:+.1f} MB")
    if json_file:
        facts = circumstances(torch.device("cpu")) | {"model": Path(model).name, "callers": callers, "minutes": minutes}
        results.save(json_file, facts | {"requests": counts, "memory": memory, "growth": growth})


if __name__ == "__main__":
    terminal.run(terminal.command(main))
