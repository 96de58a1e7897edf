"""The table and the file of the compile report: a row for each kernel, and the limits of each case on an H100."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from dataclasses import asdict
from datetime import date
from typing import Any

import triton
from rich.table import Table

from qwenkern import Config
from qwenkern.benchmarks.offline.machine_code import Code
from qwenkern.benchmarks.ops.cases import CASES, Case, Size

H100_PAPER, H100_COPY = 3.35e12, 3.0e12  # bytes/s: the data sheet, and what a copy reaches
H100_MATRIX = 790e12  # bf16 operations/s that a large matrix product reaches
WARP = 32
CASE = {case.name: case for case in CASES}


def rooflines(case: Case, config: Config, size: Size) -> tuple[float, float]:
    """The roofline time on an H100 in microseconds: at the data sheet's bandwidth, and at the measured speed of a copy
    or a matrix product."""
    moved, operations = case.bytes_moved(config, size), case.operations(config, size)
    return moved / H100_PAPER * 1e6, max(moved / H100_COPY, operations / H100_MATRIX) * 1e6


def table(model: str, rows: list[Any], verbose: bool) -> Table:
    """A row for each kernel and size, with the smallest and the largest value over the architectures."""
    config = Config.from_name(model)
    shown = Table(title=f"{model}, bfloat16, context 8192", title_justify="left")
    for heading in ("case", "tokens", "formats", "kernel", "on"):
        shown.add_column(heading, no_wrap=True)
    for heading in ("registers", "shared KiB", "CTAs/SM", "spills", "least bits", "unpack", "limit us (copy)"):
        shown.add_column(heading, justify="right", no_wrap=True)
    shown.add_column("matrix", no_wrap=True)
    by_size: dict[tuple[str, int, str, str], list[Any]] = {}
    for row in rows:
        by_size.setdefault((row.case, row.tokens, row.weights, row.pages), []).append(row)
    for (case, tokens, weights, pages), same in by_size.items():
        _, copy = rooflines(CASE[case], config, Size(tokens, weights=weights, pages=pages))
        by_kernel: dict[str, list[Any]] = {}
        for row in same:
            by_kernel.setdefault(row.kernel + (f" {row.arch}" if verbose else ""), []).append(row)
        for index, each in enumerate(by_kernel.values()):
            first = index == 0
            judged = [row for row in each if row.occupancy is not None]
            shown.add_row(
                case if first else "",
                str(tokens) if first else "",
                each[0].formats if first else "",
                each[0].kernel.strip("_").removesuffix("_kernel"),
                each[0].arch if len(each) == 1 else f"{len(each)} archs",
                _span(row.code.registers for row in each),
                _span(row.code.shared / 1024 for row in each),
                _span(row.occupancy for row in judged),
                _span(row.code.spills for row in each),
                _span(_least_width(row.code) for row in judged),
                _span((row.a_weight for row in each), 2),
                f"{copy:.2f}" if first else "",
                " ".join(sorted({re.sub("v_mfma.*", "MFMA", name) for row in each for name in row.code.matrix})),
            )
    return shown


def _least_width(code: Code) -> int | None:
    """The narrowest access among those that the rule covers."""
    return min((each.width for each in code.accesses if each.tile >= code.warps * WARP * 16), default=None)


def _span(values: Iterable[float | None], digits: int = 0) -> str:
    found = sorted({f"{value:.{digits}f}" for value in values if value is not None}, key=float)
    return "" if not found else f"{found[0]}" if len(found) == 1 else f"{found[0]}..{found[-1]}"


def document(models: list[str], rows: list[Any]) -> dict[str, Any]:
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
