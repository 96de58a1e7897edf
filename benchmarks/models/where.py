"""Shows how the time of a decode step is spent: the bandwidth limit of each op, its time, and the time between kernels.

    qwenkern bench --where --model qwen2.5-3b --tokens 1 --context 1024 --json where.json

On a GPU, the captured step is replayed under torch's profiler. Kernels with dependent launch overlap, so a kernel's
time begins when the previous kernel ends. The time in which no kernel ran is a row of its own, so the rows add up to
the step. On a CPU, each recorded call is timed by itself, between whole steps. The step's time beyond the sum of the
calls is a row of its own.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, pairwise, product
from pathlib import Path

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from qwenkern import Config
from qwenkern.benchmarks.ops.cases import CASES, Size
from qwenkern.benchmarks.ops.inputs import DENSE
from qwenkern.benchmarks.ops.timing import ceilings, circumstances, device_name
from qwenkern.benchmarks.reports import results
from qwenkern.cache import BlockTable, PagedCache
from qwenkern.checkpoint.formats import form_of
from qwenkern.checkpoint.packing import EMBEDDING, HEAD
from qwenkern.conversion import CHOICES, choose_conversion
from qwenkern.engine.capture import CallCapture, Capture, GraphCapture
from qwenkern.engine.captured_step import CapturedStep
from qwenkern.kernels import c as c_backend
from qwenkern.kernels.triton.few_tokens import MAX_TOKENS
from qwenkern.qwen2 import Qwen2, initialise
from qwenkern.sampling import Drawing

STEPS = 20
BETWEEN = "between kernels"
OTHER = "torch's own kernels"
# The op of each kernel or recorded call. If a kernel serves several ops, the order in a layer decides which op it is.
NAMES = {
    "_norm_qkv_rope_kernel": "qkv_rope",
    "rope_and_cache": "rope_and_cache",
    "_decode_attention_kernel": "decode_attention",
    "_combine_kernel": "combine",
    "decode_attention": "decode_attention",
    "_lm_head_kernel": "lm_head",
    "_top_k_kernel": "top_k",
    "embedding": "embedding",
}
GPU_LINEARS, CPU_LINEARS = ("o_proj", "gate_up", "down"), ("qkv", "o_proj", "gate_up", "down")


@dataclass(frozen=True)
class Part:
    """All launches of one op within a step."""

    name: str
    launches: int
    floor: float | None  # the roofline time in seconds, at the measured bandwidth; None if no case matches
    seconds: float


@dataclass(frozen=True)
class Span:
    """One kernel on the device's clock, in seconds."""

    name: str
    start: float
    end: float


class Recorded(CallCapture):
    """Keeps the recorded calls, which are timed one by one."""

    recorded: c_backend.RecordedCalls

    def capture(self, function: Callable[[], Tensor], has_run: bool = False) -> tuple[Callable[[], None], Tensor]:
        self.recorded = c_backend.RecordedCalls()
        try:
            with self.recorded.record():
                out = function()
        except c_backend.CannotRecord as error:
            raise RuntimeError(f"--where on a CPU needs the step in C, and torch runs it here: {error}") from error
        return self.recorded.replay, out


@torch.inference_mode()  # torch's graphs share tensors, and one made in this mode cannot be used outside
def where(config: Config, sequences: int, context: int, device: torch.device, weights: str = DENSE) -> list[Part]:
    """The parts of a decode step with random weights of a format. Each sequence has ``context`` cached tokens."""
    most = (
        MAX_TOKENS if device.type == "cuda" else c_backend.prepared().limits.max_few_tokens
    )  # for which our kernels run
    if not 1 <= sequences <= most:
        raise ValueError(f"--where: {sequences} sequences; expected 1 to {most}, for which our kernels run")
    most = config.context_length - (2 * STEPS if device.type == "cuda" else 0)  # each replay on a GPU appends a token
    if context > most:
        raise ValueError(f"--where: {context} tokens; expected at most {most}, the context")
    step, capturer = _step(config, sequences, context, device, weights)
    layers = config.num_hidden_layers
    seconds = _on_cpu(layers, capturer.recorded) if isinstance(capturer, Recorded) else _on_gpu(layers, step)
    copy = ceilings(device).copy
    cases = {case.name: case for case in CASES}
    forms = {"lm_head": form_of(HEAD, weights), "embedding": form_of(EMBEDDING, weights)}

    def roofline(name: str, launches: int) -> float | None:
        size = Size(sequences, context, device=str(device), weights=forms.get(name, weights))
        return cases[name].bytes_moved(config, size) * launches / copy if name in cases else None

    return [Part(name, len(each), roofline(name, len(each)), sum(each)) for name, each in seconds.items()]


def _step(
    config: Config, sequences: int, context: int, device: torch.device, weights: str
) -> tuple[CapturedStep, Capture]:
    """A captured step, loaded with sequences that have all tokens but the last in the cache."""
    capturer = GraphCapture(device) if device.type == "cuda" else Recorded()
    model, cache = model_and_cache(config, sequences * (context + 2 * STEPS + 64), device, weights)
    return loaded_step(model, cache, sequences, context, capturer), capturer


def model_and_cache(
    config: Config, tokens: int, device: torch.device, weights: str = DENSE
) -> tuple[Qwen2, PagedCache]:
    """A model with random weights of a format (DENSE, or a value of ``quantize=``), with activations in bfloat16, and a
    cache for ``tokens`` tokens, filled with random numbers."""
    with torch.inference_mode(False):  # the mode is of this thread only, and on a CPU other threads quantise weights
        model = Qwen2(config, torch.bfloat16, device, allocated=False)
        initialise(model, 0, None if weights == DENSE else choose_conversion(weights).quantised)
    cache = PagedCache(config, tokens, torch.bfloat16, device)
    for layer in cache.pages:
        for tensor in layer.tensors:
            tensor.normal_()
    return model, cache


def loaded_step(model: Qwen2, cache: PagedCache, sequences: int, context: int, capturer: Capture) -> CapturedStep:
    """A captured step over sequences that have all tokens but the last in the cache."""
    step = CapturedStep(model, cache, sequences, Drawing() if cache.device.type == "cuda" else None, capturer)
    tables = [BlockTable() for _ in range(sequences)]
    for table in tables:
        cache.extend(table, context + 2 * STEPS)  # each replay on a GPU appends a token
        table.length = context - 1
    step.load(cache.batch([(table, [0]) for table in tables]))
    for table in tables:
        cache.release(table)  # nobody else allocates pages while the step is timed
    return step


def _on_cpu(layers: int, recorded: c_backend.RecordedCalls) -> dict[str, list[float]]:
    names = list(labels(recorded.ops, CPU_LINEARS, layers))
    wholes: list[float] = []
    singles: list[list[float]] = [[] for _ in names]
    for _ in range(STEPS):
        wholes.append(_seconds(recorded.replay))
        for call, readings in zip(recorded.calls, singles, strict=True):
            readings.append(_seconds(partial(c_backend.play, call, 1)))
    found: dict[str, list[float]] = {}
    for name, readings in zip(names, singles, strict=True):
        found.setdefault(name, []).append(statistics.median(readings))
    rest = statistics.median(wholes) - sum(chain.from_iterable(found.values()))
    return found | {BETWEEN: [rest]}


def _seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def _on_gpu(layers: int, step: CapturedStep) -> dict[str, list[float]]:
    for _ in range(STEPS):
        step.replay()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(STEPS):
            step.replay()
        torch.cuda.synchronize()
    on_device = [each for each in profile.events() if each.device_type == torch.autograd.DeviceType.CUDA]
    spans = [Span(each.name, each.time_range.start / 1e6, each.time_range.end / 1e6) for each in on_device]
    return charge(spans, STEPS, layers)


def charge(spans: Sequence[Span], steps: int, layers: int) -> dict[str, list[float]]:
    """The time of each kernel of a step, as the median over the steps. A kernel's time begins when all earlier kernels
    have ended, or at its own start if that is later. ``BETWEEN`` is the time in which no kernel ran."""
    wholes = whole_steps(sorted(spans, key=lambda span: span.start), steps)
    names = list(labels((span.name for span in wholes[0]), GPU_LINEARS, layers))
    costs: list[list[float]] = [[] for _ in names]
    idle: list[float] = []
    for whole in wholes:
        done, waited = whole[0].start, 0.0
        for span, readings in zip(whole, costs, strict=True):
            waited += max(0.0, span.start - done)
            readings.append(max(0.0, span.end - max(done, span.start)))
            done = max(done, span.end)
        idle.append(waited)
    found: dict[str, list[float]] = {}
    for name, readings in zip(names, costs, strict=True):
        found.setdefault(name, []).append(statistics.median(readings))
    return found | {BETWEEN: [statistics.median(idle)]}


def whole_steps(spans: Sequence[Span], steps: int) -> list[Sequence[Span]]:
    """The steps of which the profiler saw every kernel. The profiler may lose some, at the beginning or later. If it
    did, the rarest kernel, which runs once per step, marks the end of each step. Raises RuntimeError if fewer than half
    of the steps are alike."""
    if spans and len(spans) % steps == 0:
        size = len(spans) // steps
        found = [spans[first : first + size] for first in range(0, len(spans), size)]
        if all([span.name for span in each] == [span.name for span in found[0]] for each in found):
            return found
    counts = Counter(span.name for span in spans)
    rarest = min(counts, key=lambda name: (abs(counts[name] - steps), name)) if counts else ""
    ends = [at + 1 for at, span in enumerate(spans) if span.name == rarest]
    pieces = [spans[begin:end] for begin, end in pairwise(ends)]
    alike = Counter(tuple(span.name for span in piece) for piece in pieces).most_common(1)
    if not alike or alike[0][1] < steps // 2:
        raise RuntimeError(f"the profiler saw {len(spans)} kernels, which are not {steps} equal steps")
    return [piece for piece in pieces if tuple(span.name for span in piece) == alike[0][0]]


def labels(names: Iterable[str], linears: Sequence[str], layers: int) -> Iterable[str]:
    """The op of each kernel of a step. The last linear of the recorded calls is lm_head."""
    seen = 0
    for name in names:
        if name in ("_linear_kernel", "linear"):
            yield linears[seen % len(linears)] if seen < layers * len(linears) else "lm_head"
            seen += 1
        else:
            yield NAMES.get(name, OTHER)


def show(
    model: str,
    sequences: Sequence[int],
    contexts: Sequence[int],
    device: torch.device,
    json_file: Path | None = None,
    weights: str = DENSE,
) -> None:
    """Prints a table for each number of sequences and cached tokens."""
    console, rows = Console(width=None if Console().is_terminal else 120), []
    if weights not in (DENSE, *CHOICES):
        raise typer.BadParameter(f"--where: {weights}; expected {DENSE} or one of {', '.join(CHOICES)}")
    form = "bfloat16" if weights == DENSE else weights
    for count, context in product(sequences, contexts):
        try:
            parts = where(Config.from_name(model), count, context, device, weights)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
        title = f"{model}, {form}, {count} sequences of {context} tokens, on {device_name(device)}"
        console.print(table(title, parts))
        rows += [{"sequences": count, "context": context, **asdict(part)} for part in parts]
        if json_file:  # after each size, because the run may be interrupted
            facts = circumstances(device) | {"model": model, "weights": weights, "ceilings": asdict(ceilings(device))}
            results.save(json_file, facts | {"rows": rows})


def table(title: str, parts: Sequence[Part]) -> Table:
    """A row for each part, and one for the whole step."""
    shown = Table(title=title, title_justify="left")
    for heading in ("op", "launches", "limit us", "measured us", "gap us", "% of limit", "% of step"):
        shown.add_column(heading, justify="left" if heading == "op" else "right", no_wrap=True)
    whole, limit = sum(part.seconds for part in parts), sum(part.floor or 0.0 for part in parts)
    for part in [*parts, Part("the step", sum(part.launches for part in parts if part.name != BETWEEN), limit, whole)]:
        shown.add_row(
            part.name,
            "" if part.name == BETWEEN else str(part.launches),
            "" if part.floor is None else f"{part.floor * 1e6:.1f}",
            f"{part.seconds * 1e6:.1f}",
            "" if part.floor is None else f"{(part.seconds - part.floor) * 1e6:.1f}",
            "" if part.floor is None or part.seconds <= 0 else f"{part.floor / part.seconds:.0%}",
            f"{part.seconds / whole:.1%}",
            style="bold" if part.name == "the step" else None,
        )
    return shown
