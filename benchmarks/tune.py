"""Searches each kernel's space of launch configurations on this device, and stores the fastest for the kernels.

    python benchmarks/tune.py --model qwen2.5-3b --budget 600
    qwenkern tune --op linear --out my/folder        then QWENKERN_CONFIG_DIR=my/folder
    qwenkern tune --step --tokens 1,16               each candidate is timed in the captured decode step

A candidate must give the right result before its time counts. A candidate that spills or does not fit does not run. If
its first reading is far slower than the best, it is not repeated. A search ends early at the roofline. Every candidate
goes to a log next to the result, from which a stopped search continues.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import triton
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import qwenkern.kernels
from qwenkern import Config
from qwenkern.benchmarks.models import step_tuning
from qwenkern.benchmarks.ops.cases import CASES, Case, Size, mapped
from qwenkern.benchmarks.ops.correctness import check, expected
from qwenkern.benchmarks.ops.inputs import DENSE
from qwenkern.benchmarks.ops.timing import ceilings, circumstances, input_sets, side_by_side
from qwenkern.benchmarks.reports import results
from qwenkern.benchmarks.run import numbers
from qwenkern.cli import terminal
from qwenkern.conversion import CHOICES
from qwenkern.kernels.environment import CONFIG_DIR
from qwenkern.kernels.triton import tuning
from qwenkern.kernels.weights import FORMATS

NEAR_THE_ROOFLINE = 1.03  # the search ends at this multiple of the roofline time
HOPELESS = 1.3  # above this multiple of the best time so far, one reading is enough
WINS = 0.98  # a candidate must be below this share of the heuristic's time; otherwise the heuristic stays


@dataclass
class Candidate:
    """One configuration, with its time or the reason why it was rejected."""

    config: dict[str, int]
    seconds: float | None = None  # None: rejected
    reason: str = ""


@dataclass
class Problem:
    """A case, with all numbers of tokens for which the kernel uses the same configuration."""

    case: Case
    config: Config
    sizes: list[Size]

    def __post_init__(self) -> None:
        self.op = _tuned_as(self.case, self.sizes[0])
        self.device = torch.device(self.sizes[0].device)
        makers = [lambda size=size: self.case.inputs(self.config, size) for size in self.sizes]
        self.sets = [input_sets(make, self.device, most=4) for make in makers]
        self.truths = [expected(self.case, sets[0]) for sets in self.sets]

    def lookup(self) -> tuple[dict[str, int], dict[str, Any]]:
        """The sizes by which the kernel looks up its configuration, and the configuration of its heuristic."""
        with tuning.trying(self.op, {}) as trial:
            self.run(self.sets[0][0])
        return trial.seen[-1]

    def run(self, inputs: tuple[Any, ...]) -> Any:
        return getattr(qwenkern.kernels, self.case.op)(*inputs)

    def check(self) -> None:
        for sets, truth in zip(self.sets, self.truths, strict=True):
            check(self.case, getattr(qwenkern.kernels, self.case.op), sets[0], truth)

    def seconds(self, patience: float = 0.05) -> float:
        """The seconds per call, as the geometric mean over the numbers of tokens."""
        medians = []
        for sets in self.sets:
            calls = {"": [partial(self.run, inputs) for inputs in sets]}
            medians.append(statistics.median(side_by_side(calls, self.device, patience)[""]))
        return statistics.geometric_mean(medians)

    def roofline(self) -> float:
        """The roofline time of a call in seconds, as the geometric mean over the numbers of tokens."""
        limits = ceilings(self.device)
        return statistics.geometric_mean(
            max(
                self.case.bytes_moved(self.config, size) / limits.copy,
                self.case.operations(self.config, size) / limits.matrix,
            )
            for size in self.sizes
        )


# Ops that share a kernel look up their configuration under one name.
_TUNED_AS = {"add_rms_norm": "rms_norm", "apply_rope": "rope_and_cache", "lm_head_top_k": "lm_head"}
_TUNED_AS |= {"attention": "decode_attention", "silu_mul": "swiglu", "silu_mul_backward": "swiglu_backward"}


def _tuned_as(case: Case, size: Size) -> str:
    return tuning.named(_TUNED_AS.get(case.op, case.op), size.weights)


def problems(case: Case, config: Config, sizes: list[Size]) -> list[Problem]:
    """The sizes of a case, grouped by the configuration that the kernel looks up. Sizes at which the kernel does not
    run are left out (for many tokens the library's product runs)."""
    op = _tuned_as(case, sizes[0])
    groups: dict[Any, list[Size]] = {}
    for size in sizes:
        with tuning.trying(op, {}) as trial:
            case.run(*case.inputs(config, size))
        if trial.seen:
            groups.setdefault(_key(trial.seen[-1][0]), []).append(size)
    return [Problem(case, config, together) for together in groups.values()]


def search(
    problem: Problem,
    space: dict[str, tuple[int, ...]],
    log: Path,
    deadline: float,
    progress: Callable[[], None] = lambda: None,
) -> tuple[dict[str, int], list[Candidate]]:
    """The best configuration (empty if the heuristic is as good), and all candidates."""
    _, heuristic = problem.lookup()
    with tuning.trying(problem.op, {}):
        default = problem.seconds()
    roofline, tried = problem.roofline(), _resume(log, heuristic)
    best = min((each.seconds for each in tried.values() if each.seconds), default=default)
    for chosen in _candidates(space, heuristic):
        progress()
        if _key(chosen) in tried:
            continue
        if time.monotonic() > deadline or best <= NEAR_THE_ROOFLINE * roofline:
            break
        candidate = _try(problem, chosen, best)
        tried[_key(chosen)] = candidate
        with log.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps([candidate.config, candidate.seconds, candidate.reason]) + "\n")
        best = min(best, candidate.seconds or best)
    good = sorted((each for each in tried.values() if each.seconds), key=lambda each: each.seconds or math.inf)
    return _beats_the_heuristic(problem, good[:3]), list(tried.values())


def _candidates(space: dict[str, tuple[int, ...]], heuristic: dict[str, int]) -> Iterator[dict[str, int]]:
    """The whole space. The candidates with the fewest changes from the heuristic come first."""
    fields = {name: values for name, values in space.items() if name in heuristic}
    everything = [dict(zip(fields, values, strict=True)) for values in itertools.product(*fields.values())]
    random.Random(0).shuffle(everything)
    everything.sort(key=lambda each: sum(each[name] != heuristic[name] for name in fields))
    return iter(everything)


def _try(problem: Problem, chosen: dict[str, int], best: float) -> Candidate:
    with tuning.trying(problem.op, chosen):
        try:
            if problem.device.type == "cuda" and (reason := _compile_time_fault(problem)):
                return Candidate(chosen, None, reason)
            problem.check()
            first = problem.seconds(patience=0.0)
            return Candidate(chosen, first if first > HOPELESS * best else problem.seconds())
        except Exception as error:  # the kernel does not compile, does not fit, or is wrong
            return Candidate(chosen, None, f"{type(error).__name__}: {error}".splitlines()[0][:200])


def _compile_time_fault(problem: Problem) -> str:
    """The reason why a candidate need not run (it spills, or needs too much shared memory), or an empty string."""
    from qwenkern.benchmarks.offline.machine_code import launches_on, read

    device = tuning.device_of(problem.sets[0][0][0])
    for sets in problem.sets:
        shapes = mapped(lambda each: each.to("meta"), sets[0])
        for launch in launches_on(device, partial(problem.run, shapes)):
            code = read(launch.kernel)
            if code.spills:
                return f"{code.spills} spills"
            if code.shared > device.shared_memory:
                return f"{code.shared} bytes of shared memory"
    return ""


def _beats_the_heuristic(problem: Problem, finalists: list[Candidate]) -> dict[str, int]:
    """The fastest of the finalists if it is faster than the heuristic when both are timed again; else empty."""
    if not finalists:
        return {}

    def seconds(config: dict[str, int]) -> float:
        with tuning.trying(problem.op, config):
            return min(problem.seconds() for _ in range(3))

    again = [(seconds(each.config), each.config) for each in finalists]
    least, winner = min(again, key=lambda pair: pair[0])
    return winner if least < WINS * seconds({}) else {}


def _key(config: dict[str, int]) -> str:
    return json.dumps(config, sort_keys=True)


def _resume(log: Path, heuristic: dict[str, int]) -> dict[str, Candidate]:
    """The candidates that an earlier search of the same kernel tried. A last line that is incomplete is tried again."""
    tried = {}
    for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else []:
        try:
            config, seconds, reason = json.loads(line)
        except ValueError:
            continue
        if set(config) <= set(heuristic):
            tried[_key(config)] = Candidate(config, seconds, reason)
    return tried


def write(file: Path, op: str, facts: dict[str, Any], sizes: dict[str, int], winner: dict[str, int]) -> None:
    """Adds the fastest configuration to a tuned file, or removes an earlier one if ``winner`` is empty."""
    entries = tuning.read_entries(file) if file.exists() else []
    entries = [entry for entry in entries if entry["sizes"] != sizes]
    if winner:
        entries.append({"sizes": sizes, "config": winner})
    results.save(file, {"op": op, **facts, "entries": entries})
    tuning.forget()


def main(
    op: Annotated[str, typer.Option(help="Cases or ops, with commas between them; default: all.")] = "",
    model: Annotated[str, typer.Option(help="A size of the family.")] = "qwen2.5-3b",
    tokens: Annotated[str, typer.Option(help="Numbers, with commas; default: those of each case.")] = "",
    context: Annotated[int, typer.Option(help="Cached tokens per sequence in decode_attention.")] = 8192,
    device: Annotated[str, typer.Option(help="auto, cpu (the interpreter) or cuda.")] = "auto",
    weights: Annotated[str, typer.Option(help="A format: then only ops that have weights are tuned.")] = DENSE,
    budget: Annotated[float, typer.Option(help="Seconds for everything.")] = 600.0,
    step: Annotated[
        bool,
        typer.Option("--step", help="Time each candidate in a whole captured decode step. Needs a GPU."),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to write to; default: QWENKERN_CONFIG_DIR, else that of the kernels."),
    ] = None,
) -> None:
    """Search for the fastest launch configurations on this device."""
    place = torch.device("cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu"))
    if place.type == "cpu" and not triton.knobs.runtime.interpret:
        raise typer.BadParameter("no GPU; expected one, or TRITON_INTERPRET=1 to try the tuner in the interpreter")
    if weights not in (possible := (DENSE, *CHOICES) if step else tuple(FORMATS)):
        raise typer.BadParameter(f"{weights!r}; expected one of {', '.join(possible)}", param_hint="--weights")
    wanted = [name for name in op.split(",") if name]
    known = [case for case in CASES if weights == DENSE or ("weights" in case.takes and case.op != "embedding")]
    cases = [case for case in known if not wanted or case.name in wanted or case.op in wanted]
    if not cases:
        raise typer.BadParameter(f"{op!r}: not among {', '.join(case.name for case in known)}")
    config = Config.from_name(model)
    root = out or Path(CONFIG_DIR.get() or Path(tuning.__file__).parent / "tuned")
    folder = root / tuning.device_of(torch.empty(1, device=place)).folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise typer.BadParameter(f"{folder} cannot be written to: {error.strerror}", param_hint="--out") from error
    chosen = numbers(tokens) if tokens else None
    facts = {name: circumstances(place)[name] for name in ("device", "triton", "date")}
    console, end = Console(), time.monotonic() + budget
    if step:
        if place.type != "cuda":
            raise typer.BadParameter("a captured step needs a GPU; expected a device of type cuda", param_hint="--step")
        _tune_step(config, chosen or [1, 16], context, weights, end, folder, facts, console)
        console.print(f"wrote {folder}; used at the next import" + (f" with QWENKERN_CONFIG_DIR={root}" if out else ""))
        return
    table = Table("case", "tokens", "tried", "rejected", "winner", title=f"{model} on {facts['device']}")
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        total = bar.add_task("everything", total=budget)
        for index, case in enumerate(cases):
            sizes = [Size(count, context, device=str(place), weights=weights) for count in chosen or case.tokens]
            for problem in problems(case, config, sizes):
                counts = ",".join(str(size.tokens) for size in problem.sizes)
                share = time.monotonic() + (end - time.monotonic()) / (len(cases) - index) / 2
                log = folder / f".{tuning.named(case.name, weights)}-{model}-{counts}.log"
                bar.update(total, description=f"{case.name} x{counts}")

                def progress() -> None:
                    bar.update(total, completed=budget - (end - time.monotonic()))

                winner, tried = search(problem, tuning.space(problem.op), log, share, progress)
                write(folder / f"{problem.op}.json", problem.op, facts, problem.lookup()[0], winner)
                rejected = sum(each.seconds is None for each in tried)
                text = ", ".join(f"{key}={value}" for key, value in winner.items()) or "the heuristic"
                table.add_row(case.name, counts, str(len(tried)), str(rejected), text)
    console.print(table)
    console.print(f"wrote {folder}; used at the next import" + (f" with QWENKERN_CONFIG_DIR={root}" if out else ""))


def _tune_step(
    config: Config,
    sequences: list[int],
    context: int,
    weights: str,
    end: float,
    folder: Path,
    facts: dict[str, Any],
    console: Console,
) -> None:
    found = step_tuning.tune(config, sequences, context, end, weights)
    rejected = sum(each.seconds is None for each in found.tried)
    counts = ",".join(map(str, sequences))
    console.print(f"a step of {counts} sequences: {found.before * 1e6:.0f} us before, {found.after * 1e6:.0f} us now")
    console.print(f"{len(found.tried)} candidates tried, {rejected} did not run")
    for (op, sizes), winner in found.configs.items():
        if reason := _wrong(op, dict(sizes), winner, config, sequences, context):
            console.print(f"{op} {dict(sizes)}: {winner} is not kept: {reason}")
            continue
        write(folder / f"{op}.json", op, facts, dict(sizes), winner)
        console.print(f"{op} {dict(sizes)}: {winner}")


def _wrong(
    op: str, sizes: dict[str, int], winner: dict[str, int], config: Config, sequences: list[int], context: int
) -> str:
    """The reason why a kernel's results are wrong with this configuration, or an empty string."""
    name, _, form = op.partition(".")
    sizes_of_step = [Size(count, context, device="cuda", weights=form or DENSE) for count in sequences]
    for case in CASES:
        if _TUNED_AS.get(case.op, case.op) == name:
            for problem in problems(case, config, sizes_of_step):
                if problem.lookup()[0] == sizes:
                    with tuning.trying(op, winner):
                        try:
                            problem.check()
                        except Exception as error:
                            return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


if __name__ == "__main__":
    terminal.run(terminal.command(main))
