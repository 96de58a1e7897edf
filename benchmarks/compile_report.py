"""Compiles every kernel at every size for many GPUs, without having one, and checks the machine code.

    python benchmarks/compile_report.py                          Qwen2.5-3B, all architectures
    python benchmarks/compile_report.py --all --json FILE        0.5B, 3B, 7B and 72B, all formats everywhere
    python benchmarks/compile_report.py --weights q4_k --pages int8 --arch sm_90

The rules:

- A kernel has no spills and no stack.
- An access has 128 bits, if the CTA moves enough bytes at once to give each thread 128 bits. Three kinds of access have
  fewer: v in 8 bits, x if the codes are signed bytes, and upper bits that are dequantised.
- The attention kernels and the few-token linears have matrix instructions.
- A kernel needs no more shared memory than the device has, and has no tile in it whose rows lie in the same banks,
  except where such a tile was measured to be faster.
- A loop that unpacks quantised weights has few instructions for this, and on an H100 the loop issues its instructions
  in about the time in which its bytes arrive (offline/unpacking.py has both limits, and says why only loops are
  judged).
- From sm_90 on, a kernel uses programmatic dependent launch.
- On an H100, the loads of an op of 3B's decode step take at most 1.3 times as long through the L2 cache as the op's
  bytes take from memory (offline/traffic.py). With quantised weights, the CTAs' repeated reads of x may take longer,
  but not longer than the same op takes in bfloat16.
- A kernel in a layer of that step fits on an SM beside the previous kernel, or it requests bytes before it waits for
  the previous kernel (offline/neighbours.py).

If a rule is broken, the exit code is 1. The rules do not apply to AMD's code, which is only listed.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import triton
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from qwenkern import Config
from qwenkern.benchmarks.offline import neighbours, plan, unpacking
from qwenkern.benchmarks.offline.machine_code import DEVICES, RESIDENT, Access, Code, Launch, launches, occupancy, read
from qwenkern.benchmarks.offline.traffic import traffic
from qwenkern.benchmarks.ops.cases import CASES, FEW, Case, Size
from qwenkern.benchmarks.ops.inputs import DENSE
from qwenkern.benchmarks.reports import compiled, results
from qwenkern.cli import terminal
from qwenkern.kernels import Weight
from qwenkern.kernels.dispatch import OPS
from qwenkern.kernels.environment import KERNELS
from qwenkern.kernels.pages import FORMATS as PAGE_FORMATS
from qwenkern.kernels.weights import FORMATS as WEIGHT_FORMATS
from qwenkern.kernels.weights.group_products import GroupNumbers

MODELS = ("qwen2.5-0.5b", "qwen2.5-3b", "qwen2.5-7b", "qwen2.5-72b")
COUNTED = "qwen2.5-3b", "sm_90"  # the PTX runner counts traffic and judges neighbours for these
MOST_L2 = 1.3  # the most time through the L2 cache, as a multiple of the time from memory
WARP = 32
# The formats of weights that are compiled for every architecture; more formats for sm_90; the formats of the cache.
WEIGHTS, MORE_WEIGHTS, PAGES = (
    ("int4", "q6_k", "int8", "fp8"),
    ("q4_0", "q4_k", "q5_0", "q5_k", "q8_0"),
    ("float16", "int8", "fp8"),
)
ONLY_DENSE = ("qkv", "lm_head")  # cases with weights that are compiled dense only: others have the same loops
DEQUANTISED = ("embedding", "gate_up")  # cases for which a kernel dequantises many tokens or rows
ON_TENSOR_CORES: tuple[str, ...] = (
    "_decode_attention_kernel",
    "_prefill_attention_kernel",
    "_linear_kernel",
    "_lm_head_kernel",
)
ON_TENSOR_CORES += ("_norm_qkv_rope_kernel",)

ATTENTION = ("_decode_attention_kernel", "_prefill_attention_kernel")
# A tile of v in 8 bits is copied in pieces of 64 bits. The tensor cores read a column of v at a time, so Triton puts
# eight values together in shared memory: a 128-bit access in bfloat16. Whole sectors of memory are still read.
BYTES_OF_V = ("v", 8)
# Codes that are signed bytes need no sum of x. The product is then the only use of a streamed tile of x, and Triton
# swizzles the tile by four values. x comes from the L2 cache; the codes themselves have 128 bits.
SIGNED_BYTES = 8, 128  # bits and zero of the format
# One line of this kernel loads codes and upper bits. A tile has 4 or 8 bytes of upper bits for each thread. The report
# knows only the largest tile and the narrowest instruction of a line.
OF_UPPER_BITS = "_dequantise_kernel", "bits"

# For this kernel, tiles whose rows lie in the same banks were faster than other tiles (docs/tuning-log.md): `down` then
# has eight warps, and reads 16 bytes per cycle from shared memory; an SM of an H100 gets 14.5 from memory.
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
    prologue: int | None = None  # instructions of a warp from the wait to the first matrix product
    weights: str = DENSE  # the format of the matrix
    pages: str = DENSE  # the format of the cache
    a_weight: float | None = None  # instructions that unpack one weight, if it is quantised (offline/unpacking.py)
    issued: float | None = None  # on an H100: time to issue a loop iteration's instructions / time of its bytes
    issue_seconds: float | None = None  # the same time for all iterations, on the SM that has most of them

    @property
    def formats(self) -> str:
        """The formats that are not dense, as text."""
        return " ".join([self.weights] * (self.weights != DENSE) + [f"{self.pages} pages"] * (self.pages != DENSE))


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
        if access.tile >= code.warps * WARP * 16 and access.width < _least_width(launch, access):
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


def _least_width(launch: Launch, access: Access) -> int:
    """The bits that an access must have if the rule covers it."""
    if (launch.name, access.name) == OF_UPPER_BITS:
        return 32
    form = launch.tile.form if launch.tile else None
    is_signed = isinstance(form, GroupNumbers) and (form.bits, form.zero) == SIGNED_BYTES
    is_v = (access.name, access.element) == BYTES_OF_V and launch.name in ATTENTION
    return 64 if is_v or (is_signed and access.name == "x") else 128


def examine(model: str, name: str, tokens: int, key: str, weights: str = DENSE, pages: str = DENSE) -> list[Row]:
    """Compiles one case at one size for one architecture. No rows if the format has no matrix of the size."""
    config, case = Config.from_name(model), _case(name)
    size = Size(tokens, device="meta", weights=weights, pages=pages)
    try:
        inputs = case.inputs(config, size)
    except ValueError:
        return []
    rows = []
    for launch in launches(key, lambda: case.run(*inputs)):
        code = read(launch.kernel)
        resident = occupancy(key, code) if key in RESIDENT else None
        broken = broken_rules(key, launch, code)
        row = Row(
            model, name, tokens, key, launch.name, launch.grid, code, resident, broken, weights=weights, pages=pages
        )
        if key in RESIDENT and launch.tile:
            matrix = next(each for each in OPS[case.op].wrap(inputs, {})[0] if isinstance(each, Weight))
            row.issue_seconds = unpacking.seconds_to_issue(launch, code, matrix.shape)
            if launch.tile.form and launch.tile.loops:
                a_weight = matrix.nbytes / math.prod(matrix.shape)
                found = unpacking.unpacking(launch.tile, code, a_weight)
                row.a_weight, row.issued = found.a_weight, found.issued
                broken += unpacking.broken_rules(key, found, tokens, a_weight)
        rows.append(row)
    planned = name in plan.STEP and pages == DENSE and (weights == DENSE or weights in plan.WEIGHTS)
    if (model, key) == COUNTED and planned and tokens in FEW:
        count_traffic(rows, case, config, size, inputs)
    return rows


def count_traffic(rows: list[Row], case: Case, config: Config, size: Size, inputs: tuple[Any, ...]) -> None:
    """Adds the traffic to the kernels of a case, and a broken rule to the first kernel if the traffic is too much."""
    fill = {"lengths_ptr": size.context}
    for row, each in zip(rows, traffic(DEVICES[COUNTED[1]], lambda: case.run(*inputs), fill), strict=True):
        row.loaded, row.early, row.prologue = each.loaded, each.early, each.prologue
    through_l2, moved = sum(row.loaded or 0 for row in rows) / plan.L2, case.bytes_moved(config, size) / plan.READ
    most = MOST_L2 * moved if size.is_dense else case.bytes_moved(config, Size(size.tokens)) / plan.READ
    if through_l2 > most:
        rows[0].broken.append(f"loads take {through_l2 * 1e6:.1f} us through L2, {moved * 1e6:.1f} us from memory")


def judge_neighbours(rows: list[Row], tokens: int, quantize: str = DENSE) -> Table:
    """Says how many programs of each kernel of a step fit beside the previous kernel, and adds broken rules."""
    model, key = COUNTED
    mine = [row for row in rows if (row.model, row.tokens, row.arch, row.pages) == (model, tokens, key, DENSE)]
    formats = plan.formats(quantize)
    kernels = [row for name in plan.STEP for row in mine if (row.case, row.weights) == (name, formats[name])]
    title = f"a decode step of {model} with {tokens} sequences on {key}, {quantize} weights"
    table = Table(title=title, title_justify="left")
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
    weights: Annotated[
        str, typer.Option(help="Formats of weights, with commas; dense: without others; default: the report's.")
    ] = "",
    pages: Annotated[str, typer.Option(help="Formats of the cache's pages, likewise.")] = "",
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
    chosen = _formats(weights, WEIGHT_FORMATS, "--weights"), _formats(pages, PAGE_FORMATS, "--pages")
    tasks = [
        (each, case.name, tokens, key, *formats)
        for each, case in itertools.product(models, CASES)
        for tokens, key in itertools.product(case.tokens, keys)
        for formats in variants(case, tokens, key, *chosen, everything)
    ]
    console = Console(width=None if Console().is_terminal else 170)
    rows: list[Row] = []
    with Progress(console=console, transient=True) as progress, _pool() as pool:
        for found in progress.track(pool.map(examine, *zip(*tasks, strict=True), chunksize=4), total=len(tasks)):
            rows += found
    steps = [
        judge_neighbours(rows, tokens, quantize)
        for quantize, tokens in itertools.product((DENSE,) if weights else (DENSE, *plan.WEIGHTS), FEW)
        if COUNTED[0] in models and COUNTED[1] in keys and weights + pages in ("", DENSE)
    ]
    for each in models:
        console.print(compiled.table(each, [row for row in rows if row.model == each], verbose))
    for table in steps:
        console.print(table)
    if json_file:
        results.save(json_file, compiled.document(models, rows))
    broken = [(row, rule) for row in rows for rule in row.broken]
    for row, rule in broken:
        what = " ".join([row.arch, row.model, row.case, f"x{row.tokens}", row.formats, row.kernel]).replace("  ", " ")
        console.print(f"[red]broken[/red] {what}: {rule}")
    console.print(f"{len(rows)} kernels on {len(keys)} architectures, {len(broken)} broken rules")
    raise typer.Exit(1 if broken else 0)


def variants(
    case: Case, tokens: int, key: str, weights: Sequence[str], pages: Sequence[str], everything: bool = False
) -> list[tuple[str, str]]:
    """The formats of weights and pages in which a case is compiled, dense ones first. ``weights`` and ``pages`` are the
    formats that the user asked for; if there are none, the report's own formats are used."""
    if list(weights) == [DENSE] and not pages:
        return [(DENSE, DENSE)]
    asked = bool(weights or pages)
    if not asked:
        weights, pages = WEIGHTS + MORE_WEIGHTS * (everything or key == COUNTED[1]), PAGES
    found = [] if asked else [(DENSE, DENSE)]
    has_kernels = tokens in FEW or case.name in DEQUANTISED
    if "weights" in case.takes and case.name not in ONLY_DENSE and has_kernels:
        found += [(each, DENSE) for each in weights]
    return found + [(DENSE, each) for each in pages if "pages" in case.takes]


def _formats(text: str, known: Iterable[str], option: str) -> list[str]:
    found = [each for each in text.split(",") if each]
    if unknown := set(found) - set(known):
        raise typer.BadParameter(f"{', '.join(unknown)}: not among {', '.join(known)}", param_hint=option)
    return found


def _pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn"))


if __name__ == "__main__":
    terminal.run(terminal.command(main))
