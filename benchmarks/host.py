"""Times the work of the host: Python and launches for each op, and the first token of a prompt.

    python benchmarks/host.py --model qwen2.5-3b --tokens 1,128 --json host.json
    python benchmarks/host.py --prompts 128,512                 also the first token of prompts this long, on a GPU

Each op is timed twice: with checks and Triton's binder in every call, and with remembered launch plans and choices of
backends. Without a GPU the ops run on meta tensors, as on an H100, with a launcher that does nothing. Then the time is
that of Python and of torch's own meta kernels.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from rich.console import Console
from rich.table import Table
from triton.compiler import CompiledKernel

from qwenkern import Config, Model
from qwenkern.benchmarks.offline.machine_code import DEVICES
from qwenkern.benchmarks.ops.cases import CASES, Size
from qwenkern.benchmarks.ops.timing import circumstances, device_name
from qwenkern.benchmarks.reports import results
from qwenkern.cli import terminal
from qwenkern.engine.capture import GraphCapture
from qwenkern.kernels.triton import launching, tuning
from qwenkern.kernels.triton.offline import active

CALLS = 50  # calls between two readings of the clock: fewer launches than a GPU queues
READINGS = 15
ON_LIBRARY = ("norm_linear", "norm_qkv_rope", "norm_swiglu_linear", "linear", "lm_head", "lm_head_top_k", "embedding")


@dataclass(frozen=True)
class Row:
    """The host's time for one call, in microseconds."""

    case: str
    tokens: int
    bound: float  # with checks and Triton's binder in every call
    remembered: float


@dataclass(frozen=True)
class FirstToken:
    """The time from a prompt to its first token, in milliseconds."""

    prompt: int
    op_by_op: float
    captured: float


@contextlib.contextmanager
def _nothing_remembered() -> Iterator[None]:
    contract = importlib.import_module("qwenkern.kernels.contract")
    with (
        mock.patch.object(launching.Planned, "__getitem__", lambda self, grid: self.kernel[grid]),
        mock.patch.object(contract, "signature", return_value=None),
    ):
        yield


def _nothing(*args: Any) -> None:
    """Does nothing, in place of a launch."""


@contextlib.contextmanager
def _without_a_gpu() -> Iterator[None]:
    """Kernels are compiled for an H100, and their launches do nothing."""
    device = DEVICES["sm_90"]
    nothing = mock.patch.object(CompiledKernel, "run", _nothing)
    planned = mock.patch.object(
        launching.Planned, "__getitem__", lambda self, grid: functools.partial(self._launch, grid)
    )
    function = mock.patch.object(CompiledKernel, "function", None, create=True)
    handles = mock.patch.object(CompiledKernel, "_init_handles", _nothing)
    with tuning.offline(device), active(device), nothing, planned, function, handles:
        yield


def _microseconds(call: Callable[[], Any], on_gpu: bool) -> float:
    """The smallest of several readings, because other processes on the machine only add to the time. Without a GPU the
    host waits for nothing, so the processor time of this process counts."""
    clock = time.perf_counter if on_gpu else time.process_time
    readings = []
    for _ in range(READINGS):
        if on_gpu:
            torch.cuda.synchronize()
        started = clock()
        for _ in range(CALLS):
            call()
        readings.append((clock() - started) / CALLS * 1e6)
    return min(readings)


@torch.inference_mode()
def ops(config: Config, tokens: list[int], device: torch.device, context: int) -> list[Row]:
    """A row for each case and number of tokens. On the device "meta", only ops that run on our kernels have rows."""
    rows, on_gpu = [], device.type == "cuda"
    with contextlib.nullcontext() if on_gpu else _without_a_gpu():
        for case in CASES:
            for count in tokens:
                if not on_gpu and count > 16 and case.op in ON_LIBRARY:
                    continue  # for products, torch takes longer on meta tensors than on a GPU
                inputs = case.inputs(config, Size(count, context, device=str(device)))
                call = functools.partial(case.run, *inputs)
                call()
                with _nothing_remembered():
                    call()
                    bound = _microseconds(call, on_gpu)
                call()
                rows.append(Row(case.name, count, bound, _microseconds(call, on_gpu)))
    return rows


def first_tokens(config: Config, prompts: list[int], device: torch.device) -> list[FirstToken]:
    """The times of whole calls of `generate` for one token."""
    model = Model.from_config(config, device=device, dtype="bfloat16", cache_tokens=4096, prefix_cache=False)

    def milliseconds(prompt: int) -> float:
        readings = []
        for seed in range(5 + 3):
            ids = [(seed + 7 * at) % 1000 for at in range(prompt)]
            torch.cuda.synchronize()
            started = time.perf_counter()
            model.generate([ids], max_tokens=1, temperature=0, ignore_eos=True)
            readings.append((time.perf_counter() - started) * 1e3)
        return statistics.median(readings[3:])

    rows = []
    for prompt in prompts:
        with mock.patch.object(GraphCapture, "padded_prompt", return_value=None):
            op_by_op = milliseconds(prompt)
        rows.append(FirstToken(prompt, op_by_op, milliseconds(prompt)))
    return rows


def table(title: str, headings: Sequence[str], rows: list[Any], unit: str) -> Table:
    shown = Table(title=title, title_justify="left")
    for heading in headings:
        shown.add_column(heading, justify="right" if heading != headings[0] else "left")
    for row in rows:
        *keys, before, now = asdict(row).values()
        shown.add_row(*map(str, keys), f"{before:.1f} {unit}", f"{now:.1f} {unit}", f"{before / now:.1f}")
    return shown


def main(
    model: Annotated[str, typer.Option(help="A size of the family.")] = "qwen2.5-3b",
    tokens: Annotated[str, typer.Option(help="Numbers of tokens, with commas.")] = "1,128",
    context: Annotated[int, typer.Option(help="Cached tokens of a sequence.")] = 1024,
    prompts: Annotated[str, typer.Option(help="Lengths of prompts, with commas. Needs a GPU.")] = "",
    json: Annotated[Path | None, typer.Option(help="Writes the results to this file.")] = None,
) -> None:
    """Times what the host does for each op, and for the first token of a prompt."""
    console, on_gpu = Console(width=None if Console().is_terminal else 120), torch.cuda.is_available()
    device, config = torch.device("cuda" if on_gpu else "meta"), Config.from_name(model)
    if prompts and not on_gpu:
        raise typer.BadParameter("--prompts: there is no GPU here")
    lengths = [int(each) for each in prompts.split(",") if each]
    rows = ops(config, [int(each) for each in tokens.split(",")], device, context)
    where = device_name(device) if on_gpu else "no GPU: Python alone"
    headings = ("op", "tokens", "bound and checked", "remembered", "speed-up")
    console.print(table(f"host time of an op of {model}, {where}", headings, rows, "us"))
    firsts = first_tokens(config, lengths, device) if lengths else []
    if firsts:
        of_prompts = ("tokens of the prompt", "op by op", "captured", "speed-up")
        console.print(table(f"first token of {model}, {where}", of_prompts, firsts, "ms"))
    if json:
        facts = circumstances(device if on_gpu else torch.device("cpu")) | {"model": model, "on_gpu": on_gpu}
        results.save(json, facts | {"rows": [asdict(row) for row in rows], "first": [asdict(each) for each in firsts]})


if __name__ == "__main__":
    terminal.run(terminal.command(main))
