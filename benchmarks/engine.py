"""Measures what the engine saves and what it costs, on one model.

    python benchmarks/engine.py                       the demo model on a CPU
    python benchmarks/engine.py --json FILE

- own work: the time of a step with a model that computes nothing, also while 10,000 requests wait.
- speculation: the time of a text with and without speculation, alternately; the texts must be equal to the last bit.
- next turn: the time to the first token of a conversation's second turn, compared with the first turn.
- gap: the longest time between two tokens of a stream while the engine reads a long prompt.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from qwenkern import Completion, Model, SamplingParams
from qwenkern.benchmarks.ops.timing import circumstances
from qwenkern.benchmarks.reports import results
from qwenkern.cache import Batch, PagedCache
from qwenkern.cli import terminal
from qwenkern.config import Config
from qwenkern.engine import Engine, Limits, Runner
from qwenkern.engine.capture import CallCapture

ROOT = Path(__file__).resolve().parents[1]
GREEDY = SamplingParams(temperature=0, repetition_penalty=1.0, logprobs=0)
SAMPLED = SamplingParams(temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05, seed=1, logprobs=0)
TOGETHER = "8 at once, greedy"
Run = Callable[[Model], list[Completion]]


def tasks() -> dict[str, list[str]]:
    """Questions whose answers repeat much of the prompt, and questions whose answers do not."""
    code = (ROOT / "qwenkern" / "cache" / "allocator.py").read_text(encoding="utf-8")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    edit = "Rename the class BlockTable to Table in this code. Answer with the whole code.\n```python\n"
    stories = ("a lighthouse keeper and her dog", "the first rain after a dry year", "two clocks that disagree")
    return {
        "code is edited": [f"{edit}{code[at : at + 2500]}\n```" for at in (0, 2500)],
        "a text is quoted": [f"Repeat this text word for word:\n{text[at : at + 1500]}" for at in (0, 1500)],
        "fresh prose": [f"Write a story about {what}." for what in stories],
    }


def speculation(fast: Model, plain: Model, new: int, repeats: int) -> list[dict[str, Any]]:
    """A row for each kind of text, with the speed-up by speculation."""
    rows, middle = [], results.middle_and_ends
    kinds: dict[str, Run] = {}
    for name, questions in tasks().items():
        for how, params in (("greedy", GREEDY), ("sampled", SAMPLED)):
            kinds[f"{name}, {how}"] = partial(one_by_one, questions, replace(params, max_tokens=new))
    questions = [each for questions in tasks().values() for each in questions]
    kinds[TOGETHER] = partial(together, (questions * 2)[:8], replace(GREEDY, max_tokens=new))
    for name, run in kinds.items():
        ratios, rates = [], []
        for turn in range(repeats + 1):
            (slow, before), (quick, now) = timed(plain, run), timed(fast, run)
            # if prompts share forward passes, the bits depend on which prompts share one
            if name != TOGETHER and [each.logprobs for each in before] != [each.logprobs for each in now]:
                raise RuntimeError(f"{name}: speculation has changed a text or its log-probabilities")
            if turn:  # the first round fills the prefix cache and captures the steps
                ratios.append(slow / quick)
                rates.append(sum(each.num_tokens for each in now) / quick)
        rows.append({"case": name, "speedup": middle(ratios), "tokens_per_second": middle(rates)})
    return rows


def one_by_one(questions: list[str], params: SamplingParams, model: Model) -> list[Completion]:
    return [model.generate([chat(each)], params)[0] for each in questions]


def together(questions: list[str], params: SamplingParams, model: Model) -> list[Completion]:
    return model.generate([chat(each) for each in questions], params)


def chat(question: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}]


def timed(model: Model, run: Run) -> tuple[float, list[Completion]]:
    begin = time.perf_counter()
    found = run(model)
    return time.perf_counter() - begin, found


def next_turn(model: Model, tokens: int) -> dict[str, float]:
    """Seconds to the first token, in a conversation's first turn, which has ``tokens`` tokens, and in its second."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert model.tokenizer
    ids = model.tokenizer.encode(text * (1 + 6 * tokens // len(text)))[:tokens]
    messages = chat(model.tokenizer.decode(ids) + "\nSummarise this.")
    first, answer = first_token(model, messages)
    messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "And in one sentence?"}]
    second, _ = first_token(model, messages)
    return {"tokens": tokens, "first_turn": first, "second_turn": second, "share": second / first}


def first_token(model: Model, messages: list[dict[str, Any]]) -> tuple[float, str]:
    begin = time.perf_counter()
    stream = model.stream(messages, replace(GREEDY, max_tokens=40))
    text = next(stream)
    seconds = time.perf_counter() - begin
    return seconds, text + "".join(stream)


def gap(model: Model, tokens: int) -> dict[str, float]:
    """The longest and the median gap of a stream while the engine reads another prompt of ``tokens`` tokens."""
    stream = model.stream([1] * 20, replace(GREEDY, max_tokens=2000, ignore_eos=True))
    times = [time.perf_counter() for _, _ in zip(range(20), stream, strict=False)]
    alone = statistics.median(after - before for before, after in pairwise(times))
    other = model.stream([n * 7919 % 100_000 for n in range(tokens)], replace(GREEDY, max_tokens=1))
    request, times = other._request, [time.perf_counter()]
    for _ in stream:
        times.append(time.perf_counter())
        if request.has_ended:
            break
    stream.close()
    gaps = [after - before for before, after in pairwise(times)]
    return {"prompt": tokens, "alone": alone, "median": statistics.median(gaps), "longest": max(gaps)}


class Nothing(CallCapture):
    """Captures no step, so that any object can stand in for the model."""

    def padded(self, sequences: int) -> None:
        return None


def own_work(sequences: int, waiting: int, steps: int = 300) -> float:
    """Milliseconds of a step with a model that computes nothing."""
    config = Config.from_name("qwen2.5-0.5b")
    small = Config(**{**vars(config), "vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 1})
    model = Model.from_config(small, device="cpu", dtype="float32", cache_tokens=sequences * 1024)
    logits = torch.zeros(sequences, small.vocab_size)

    def forward(batch: Batch, cache: PagedCache, rows: torch.Tensor | None = None) -> torch.Tensor:
        return logits[: len(batch.ids if rows is None else rows)].clone()

    vars(model.module)["forward"] = forward
    cache = PagedCache(small, sequences * 1024, torch.float32, torch.device("cpu"))
    with Engine(Runner(model.module, cache, Nothing()), Limits(512, max_batch=sequences)) as engine:
        params = SamplingParams(max_tokens=steps + 50, temperature=0, ignore_eos=True)
        requests = [model._requests([[n % 900] * 100], params)[0] for n in range(sequences + waiting)]
        engine.add(*requests)
        while not all(request.output_ids for request in requests[:sequences]):
            engine.step()
        begin = time.thread_time()
        for _ in range(steps):
            engine.step()
        return (time.thread_time() - begin) / steps * 1e3


def main(
    model: Annotated[str, typer.Option(help="What `generate` takes.")] = "demo",
    new: Annotated[int, typer.Option("--new-tokens", min=1, help="Tokens of each text.")] = 200,
    turn: Annotated[int, typer.Option(min=64, help="Tokens of the first turn, and of the long prompt.")] = 8192,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds, after one that does not count.")] = 3,
    note: Annotated[str, typer.Option(help="Stored with the result.")] = "",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result there.")] = None,
) -> None:
    """Measure what the engine saves and costs."""
    console = Console()
    work = {f"{count}, {waiting} wait": own_work(count, waiting) for count, waiting in ((1, 0), (64, 0), (1, 10_000))}
    console.print({name: f"{value:.3f} ms" for name, value in work.items()})
    fast = Model.from_pretrained(model, device="cpu", cache_tokens=3 * turn)
    plain = Model.from_pretrained(model, device="cpu", cache_tokens=turn, speculate=False)
    rows = speculation(fast, plain, new, repeats)
    for row in rows:
        console.print(row)
    turns, gaps = next_turn(fast, turn), gap(fast, turn)
    console.print(turns, gaps)
    if json_file:
        facts: dict[str, Any] = circumstances(torch.device("cpu")) | {"model": Path(model).name, "note": note}
        results.save(json_file, facts | {"rows": rows, "own_work": work, "next_turn": turns, "gap": gaps})


if __name__ == "__main__":
    terminal.run(terminal.command(main))
