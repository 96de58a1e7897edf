"""Compiles every kernel at every size for many GPUs, without having one, and checks the machine code.

    python benchmarks/compile_report.py                          Qwen2.5-3B, all architectures
    python benchmarks/compile_report.py --all --json FILE        0.5B, 3B, 7B and 72B

The rules:

- A kernel has no spills and no stack.
- An access has 128 bits, if the CTA moves enough bytes at once to give each thread 128 bits.
- The attention kernels and the few-token linears have matrix instructions.
- A kernel needs no more shared memory than the device has, and has no tile there whose rows lie in the same banks,
  except where that was measured to be faster.
- From sm_90 on, a kernel uses programmatic dependent launch.
- On an H100, what an op of 3B's decode step loads takes at most 1.3 times as long through the L2 cache as the bytes of
  the op take from memory (offline/traffic.py).
- A kernel of a layer of that step fits on an SM beside the one before, or it requests bytes before it waits for that
  one (offline/neighbours.py).

If a rule is broken, the exit code is 1. The rules do not apply to AMD's code, which is only listed.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import triton
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from qwenkern import Config
from qwenkern.benchmarks.offline import neighbours, plan
from qwenkern.benchmarks.offline.machine_code import DEVICES, RESIDENT, Code, Launch, launches, occupancy, read
from qwenkern.benchmarks.offline.traffic import traffic
from qwenkern.benchmarks.ops.cases import CASES, FEW, Case, Size
from qwenkern.benchmarks.reports import results
from qwenkern.cli import terminal
from qwenkern.kernels.environment import KERNELS

MODELS = ("qwen2.5-0.5b", "qwen2.5-3b", "qwen2.5-7b", "qwen2.5-72b")
COUNTED = "qwen2.5-3b", "sm_90"  # for which traffic is counted and neighbours are judged, on the PTX runner
MOST_L2 = 1.3  # times as long as from memory
WARP = 32
H100_PAPER, H100_COPY = 3.35e12, 3.0e12  # bytes/s: the data sheet, and what a copy reaches
H100_MATRIX = 790e12  # bf16 operations/s that a large matrix product reaches
ON_TENSOR_CORES: tuple[str, ...] = (
    "_decode_attention_kernel",
    "_prefill_attention_kernel",
    "_linear_kernel",
    "_lm_head_kernel",
)
ON_TENSOR_CORES += ("_norm_qkv_rope_kernel",)

# Here tiles whose rows lie in the same banks were faster than the tiles without them (docs/tuning-log.md): `down` takes
# eight warps then, and reads 16 bytes a cycle from shared memory, where an SM of an H100 gets 14.5 from its memory.
CONFLICTS_MEASURED = {("_linear_kernel", "sm_90")}


@dataclass
class Row:
    """One kernel, of one case and size, on one architecture."""

    model: str
    case: str
    tokens: int
    arch: str
    kernel: str
    grid: tuple[int, ...]
    code: Code
    occupancy: int | None  # CTAs per SM
    broken: list[str]
    loaded: int | None = None  # bytes from global memory, if they were counted (offline/traffic.py)
    early: int | None = None  # bytes requested before the wait
    prologue: int | None = None  # instructions of a warp from there to the first matrix product


def broken_rules(key: str, launch: Launch, code: Code) -> list[str]:
    """The rules that a kernel's code breaks, as text."""
    if key not in RESIDENT:
        return []
    broken = []
    if code.spills or code.stack:
        broken.append(f"{code.spills} spills and {code.stack} bytes of stack")
    if code.shared > DEVICES[key].shared_memory:
        broken.append(f"{code.shared} bytes of shared memory, and the device has {DEVICES[key].shared_memory}")
    for access in code.accesses:
        # if a tile has less than 16 bytes per thread, not every thread can move 128 bits
        if access.tile >= code.warps * WARP * 16 and access.width < 128:
            broken.append(f"{access.width}-bit {access.kind} of {access.tile} bytes ({access.name} {access.line})")
    if code.clashes and (launch.name, key) not in CONFLICTS_MEASURED:
        broken.append(f"{code.clashes} tiles in shared memory whose rows lie in the same banks")
    if launch.name in ON_TENSOR_CORES and not code.matrix:
        broken.append("no matrix instruction")
    if launch.pdl != bool(code.waits and code.releases):
        broken.append(f"dependent launch is {launch.pdl}, with {code.waits} waits and {code.releases} releases")
    if DEVICES[key].capability >= 90 and not launch.pdl:
        broken.append("no programmatic dependent launch")
    return broken


def rooflines(case: Case, config: Config, size: Size) -> tuple[float, float]:
    """The roofline time on an H100 in microseconds: at the data sheet's bandwidth, and at the measured speed of a copy
    or a matrix product."""
    moved, operations = case.bytes_moved(config, size), case.operations(config, size)
    return moved / H100_PAPER * 1e6, max(moved / H100_COPY, operations / H100_MATRIX) * 1e6


def examine(model: str, name: str, tokens: int, key: str) -> list[Row]:
    """Compiles one case at one size for one architecture."""
    config, case = Config.from_name(model), _case(name)
    inputs = case.inputs(config, Size(tokens, device="meta"))
    rows = []
    for launch in launches(key, lambda: case.run(*inputs)):
        code = read(launch.kernel)
        resident = occupancy(key, code) if key in RESIDENT else None
        broken = broken_rules(key, launch, code)
        rows.append(Row(model, name, tokens, key, launch.name, launch.grid, code, resident, broken))
    if (model, key) == COUNTED and name in plan.STEP and tokens in FEW:
        count_traffic(rows, case, config, inputs)
    return rows


def count_traffic(rows: list[Row], case: Case, config: Config, inputs: tuple[Any, ...]) -> None:
    """Adds their traffic to the kernels of a case, and a broken rule to the first if it is too much."""
    size = Size(rows[0].tokens)
    fill = {"lengths_ptr": size.context}
    for row, each in zip(rows, traffic(DEVICES[COUNTED[1]], lambda: case.run(*inputs), fill), strict=True):
        row.loaded, row.early, row.prologue = each.loaded, each.early, each.prologue
    through_l2, moved = sum(row.loaded or 0 for row in rows) / plan.L2, case.bytes_moved(config, size) / plan.READ
    if through_l2 > MOST_L2 * moved:
        rows[0].broken.append(f"loads take {through_l2 * 1e6:.1f} us through L2, {moved * 1e6:.1f} us from memory")


def judge_neighbours(rows: list[Row], tokens: int) -> Table:
    """Says how many programs of each kernel of a step find room beside the kernel before, and adds broken rules."""
    model, key = COUNTED
    mine = [row for row in rows if (row.model, row.tokens, row.arch) == (model, tokens, key)]
    kernels = [row for name in plan.STEP for row in mine if row.case == name]
    table = Table(title=f"a decode step of {model} with {tokens} sequences on {key}", title_justify="left")
    for heading in ("kernel", "programs on an SM", "next kernel", "its programs that fit beside", "requests early, MB"):
        table.add_column(heading, justify="left" if "kernel" in heading else "right", no_wrap=True)
    for before, after in neighbours.pairs(kernels, plan.STEP[-1]) if kernels else []:
        names = [f"{each.case} {each.kernel.strip('_').removesuffix('_kernel')}" for each in (before, after)]
        counts = [str(neighbours.resident(key, before)), str(neighbours.room(key, before, after))]
        table.add_row(names[0], counts[0], names[1], counts[1], f"{(after.early or 0) / 1e6:.1f}")
        if (said := neighbours.overlaps_nothing(key, before, after)) and after.case in plan.LAYER:
            after.broken.append(said)
    return table


def _case(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def main(
    model: Annotated[list[str], typer.Option(help="Sizes of the family.")] = ["qwen2.5-3b"],  # noqa: B006
    arch: Annotated[list[str], typer.Option(help=f"Of {', '.join(DEVICES)}.")] = list(DEVICES),  # noqa: B006
    everything: Annotated[bool, typer.Option("--all", help=f"{', '.join(MODELS)}, on every architecture.")] = False,
    verbose: Annotated[bool, typer.Option(help="Print a row for every architecture.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything there.")] = None,
) -> None:
    """Compile every kernel for every architecture, and check its machine code."""
    if triton.knobs.runtime.interpret:
        raise typer.BadParameter("TRITON_INTERPRET=1 is set, so kernels are not compiled; expected it to be unset")
    if unknown := set(arch) - set(DEVICES):
        raise typer.BadParameter(f"{', '.join(unknown)}: not among {', '.join(DEVICES)}", param_hint="--arch")
    os.environ.pop(KERNELS.name, None)
    models, keys = (list(MODELS), list(DEVICES)) if everything else (model, arch)
    tasks = [
        (each, case.name, tokens, key)
        for each, case in itertools.product(models, CASES)
        for tokens, key in itertools.product(case.tokens, keys)
    ]
    console = Console(width=None if Console().is_terminal else 170)
    rows: list[Row] = []
    with Progress(console=console, transient=True) as progress, _pool() as pool:
        for found in progress.track(pool.map(examine, *zip(*tasks, strict=True), chunksize=4), total=len(tasks)):
            rows += found
    steps = [judge_neighbours(rows, tokens) for tokens in FEW if COUNTED[0] in models and COUNTED[1] in keys]
    for each in models:
        console.print(_table(each, [row for row in rows if row.model == each], verbose))
    for table in steps:
        console.print(table)
    if json_file:
        results.save(json_file, _document(models, rows))
    broken = [(row, rule) for row in rows for rule in row.broken]
    for row, rule in broken:
        console.print(f"[red]broken[/red] {row.arch} {row.model} {row.case} x{row.tokens} {row.kernel}: {rule}")
    console.print(f"{len(rows)} kernels on {len(keys)} architectures, {len(broken)} broken rules")
    raise typer.Exit(1 if broken else 0)


def _pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn"))


def _table(model: str, rows: list[Row], verbose: bool) -> Table:
    """A row for each kernel and size, with the smallest and the largest value over the architectures."""
    config = Config.from_name(model)
    table = Table(title=f"{model}, bfloat16, context 8192", title_justify="left")
    for heading in ("case", "tokens", "kernel", "on"):
        table.add_column(heading, no_wrap=True)
    for heading in ("registers", "shared KiB", "CTAs/SM", "spills", "least bits", "limit us", "limit us (copy)"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("matrix", no_wrap=True)
    for key, same in itertools.groupby(rows, lambda row: (row.case, row.tokens)):
        paper, copy = rooflines(_case(key[0]), config, Size(key[1]))
        by_kernel: dict[str, list[Row]] = {}
        for row in same:
            by_kernel.setdefault(row.kernel + (f" {row.arch}" if verbose else ""), []).append(row)
        for index, each in enumerate(by_kernel.values()):
            first = index == 0
            judged = [row for row in each if row.occupancy is not None]
            table.add_row(
                key[0] if first else "",
                str(key[1]) if first else "",
                each[0].kernel.strip("_").removesuffix("_kernel"),
                each[0].arch if len(each) == 1 else f"{len(each)} archs",
                _span(row.code.registers for row in each),
                _span(row.code.shared / 1024 for row in each),
                _span(row.occupancy for row in judged),
                _span(row.code.spills for row in each),
                _span(_least_width(row.code) for row in judged),
                f"{paper:.2f}" if first else "",
                f"{copy:.2f}" if first else "",
                " ".join(sorted({re.sub("v_mfma.*", "MFMA", name) for row in each for name in row.code.matrix})),
            )
    return table


def _least_width(code: Code) -> int | None:
    """The narrowest access among those that the rule covers."""
    return min((each.width for each in code.accesses if each.tile >= code.warps * WARP * 16), default=None)


def _span(values: Iterable[float | None]) -> str:
    found = sorted({round(value) for value in values if value is not None})
    return "" if not found else f"{found[0]}" if len(found) == 1 else f"{found[0]}..{found[-1]}"


def _document(models: list[str], rows: list[Row]) -> dict[str, Any]:
    least = [
        {"model": model, "case": case.name, "tokens": tokens, "paper_us": paper, "copy_us": copy}
        for model, case in itertools.product(models, CASES)
        for tokens in case.tokens
        for paper, copy in [rooflines(case, Config.from_name(model), Size(tokens))]
    ]
    return {
        "triton": triton.__version__,
        "date": date.today().isoformat(),
        "h100_floors": least,
        "kernels": [asdict(row) for row in rows],
    }


if __name__ == "__main__":
    terminal.run(terminal.command(main))
