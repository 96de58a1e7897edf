"""Times every kernel and its alternatives, and compares each with the roofline.

    python benchmarks/run.py --op add_rms_norm --tokens 1,16,512
    python benchmarks/run.py --json now.json --base benchmarks/results/nvidia-h100-80gb-hbm3/kernels.json
    python benchmarks/run.py --where --context 1024
    python benchmarks/run.py --weights int4,q4_k --op gate_up,down,lm_head --tokens 1,16
    python benchmarks/run.py --pages int8 --op decode_attention,rope_and_cache
    python benchmarks/run.py --side-a qwenkern --side-b qwenkern:my/tuned/folder

The result of each provider is compared with the float64 reference before it is timed. A wrong result of ours fails the
run. Another provider that is wrong or raises is reported and left out. Without a GPU, the ops on the CPU are timed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from qwenkern import Config
from qwenkern.benchmarks.models import where
from qwenkern.benchmarks.ops.cases import CASES, Case, Size
from qwenkern.benchmarks.ops.correctness import check, expected
from qwenkern.benchmarks.ops.inputs import DENSE, dequantised
from qwenkern.benchmarks.ops.providers import PROVIDERS, Function, Provider
from qwenkern.benchmarks.ops.timing import Ceilings, Spread, ceilings, circumstances, input_sets, side_by_side
from qwenkern.benchmarks.reports import results
from qwenkern.benchmarks.reports.pictures import plot
from qwenkern.benchmarks.reports.results import Row
from qwenkern.cli import terminal
from qwenkern.kernels.environment import CONFIG_DIR
from qwenkern.kernels.pages import FORMATS as PAGES
from qwenkern.kernels.triton import tuning
from qwenkern.kernels.weights import FORMATS as WEIGHTS

ALL_PROVIDERS = ",".join(provider.name for provider in PROVIDERS)


@torch.inference_mode()  # also for the check, because another mode or other kinds of tensors would be compiled again
def measure(
    case: Case, model: str, size: Size, providers: list[Provider], limits: Ceilings, seconds: float
) -> list[Row]:
    """The rows of one case at one size. Each round times every provider."""
    config, device = Config.from_name(model), torch.device(size.device)
    key = (case.name, model, size.tokens, size.context, str(size.dtype).removeprefix("torch."))
    sets = input_sets(lambda: case.inputs(config, size), device)
    dense = sets if size.is_dense else [dequantised(inputs) for inputs in sets]
    given: dict[str, list[tuple[Any, ...]]] = {}
    functions: dict[str, Function] = {}
    rows: list[Row] = []
    truth = expected(case, sets[0])
    for provider in providers:
        try:
            left_out = (provider.gpu_only and device.type != "cuda") or (provider.only_quantised and size.is_dense)
            function = None if left_out else provider.function(case)
            if function is None:
                continue
            its = given[provider.name] = sets if provider.takes_formats else dense
            if provider.same:
                check(case, function, its[0], truth)
            else:
                function(*its[0])
            functions[provider.name] = function
        except ImportError:
            continue  # not installed
        except Exception as error:  # the failure of a peer is a result, not the end of the run
            said = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            rows.append(Row(*key, provider.name, None, error=said, weights=size.weights, pages=size.pages))
    calls = {name: [_bound(function, inputs) for inputs in given[name]] for name, function in functions.items()}
    if not calls:
        return rows
    readings = side_by_side(calls, device, seconds)
    moved, operations = case.bytes_moved(config, size), case.operations(config, size)
    ours = next(iter(readings.values()))
    for provider in providers:
        if provider.name not in readings:
            continue
        spread = Spread.of(readings[provider.name])
        row = Row(
            *key,
            provider.name,
            spread,
            same=provider.same,
            weights=size.weights,
            pages=size.pages,
            bandwidth=moved / spread.p50,
            rate=operations / spread.p50,
            of_copy=moved / spread.p50 / limits.copy,
            of_matrix=operations / spread.p50 / limits.matrix,
            floor=max(moved / limits.copy, operations / limits.matrix),
            ratio=results.ratios(readings[provider.name], ours),
        )
        rows.append(row)
    return rows


def _bound(function: Function, inputs: tuple[Any, ...]) -> Callable[[], Any]:
    return lambda: function(*inputs)


def _providers(names: list[str]) -> list[Provider]:
    """The providers of these names. "qwenkern:FOLDER" is our kernels with the tuned configurations of a folder."""
    known = {provider.name: provider for provider in PROVIDERS}
    chosen: list[Provider] = []
    for name in names or known:
        base, _, folder = name.partition(":")
        if base not in known or (folder and base != "qwenkern"):
            raise typer.BadParameter(f"{name!r}: not among {', '.join(known)} and qwenkern:FOLDER")
        chosen.append(_with_folder(name, known[base], folder) if folder else known[base])
    return chosen


def _with_folder(name: str, provider: Provider, folder: str) -> Provider:
    def function(case: Case) -> Function | None:
        inner = provider.function(case)
        if inner is None:
            return None

        def run(*inputs: Any) -> Any:
            with _tuned_by(folder):
                return inner(*inputs)

        return run

    return replace(provider, name=name, function=function)


@contextlib.contextmanager
def _tuned_by(folder: str) -> Iterator[None]:
    name = CONFIG_DIR.name
    before = os.environ.get(name)
    os.environ[name] = folder
    tuning.forget()
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before
        tuning.forget()


def show(console: Console, rows: list[Row], limits: Ceilings) -> None:
    table = Table(title=f"copy {limits.copy / 1e9:.0f} GB/s, matrix {limits.matrix / 1e12:.2f} TFLOP/s, measured now")
    for heading in ("case", "tokens", "provider"):
        table.add_column(heading, no_wrap=True)
    for heading in ("us p50", "p20..p80", "roofline us", "GB/s", "% copy", "TFLOP/s", "% matrix", "speed-up over it"):
        table.add_column(heading, justify="right", no_wrap=True)
    before = None
    for row in rows:
        head = (row.place, str(row.tokens))
        cells = (*(head if head != before else ("", "")), row.provider + ("" if row.same else " *"))
        before = head
        if row.seconds is None or row.ratio is None:
            table.add_row(*cells, "[red]failed[/red]")
            continue
        micro = [value * 1e6 for value in (row.seconds.p20, row.seconds.p80, row.floor)]
        table.add_row(
            *cells,
            f"{row.seconds.p50 * 1e6:.2f}",
            f"{micro[0]:.2f}..{micro[1]:.2f}",
            f"{micro[2]:.2f}",
            f"{row.bandwidth / 1e9:.1f}",
            f"{row.of_copy:.0%}",
            f"{row.rate / 1e12:.3f}",
            f"{row.of_matrix:.0%}",
            f"{row.ratio.p50:.2f} ({row.ratio.p20:.2f}..{row.ratio.p80:.2f})",
        )
    console.print(table)
    for row in rows:
        if row.error:
            console.print(f"[red]failed[/red] {row.place} x{row.tokens} {row.provider}: {row.error}", soft_wrap=True)
    if any(not row.same for row in rows):
        console.print("* work of the same size, not the same op: the matrix product only, or attention without pages")


def numbers(text: str) -> list[int]:
    """The numbers of an option, which have commas between them."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or min(values) < 1:
        raise typer.BadParameter(f"{text!r}: expected numbers from 1 on, with commas between them")
    return values


def _cases(names: str) -> list[Case]:
    """The cases of these names, in their order; all if there are none."""
    known = {name for case in CASES for name in (case.name, case.op)}
    wanted = [name for name in names.split(",") if name]
    if unknown := set(wanted) - known:
        raise typer.BadParameter(f"{', '.join(unknown)}: not among {', '.join(sorted(known))}")
    chosen = [case for name in wanted for case in CASES if name in (case.name, case.op)]
    return list(dict.fromkeys(chosen)) or CASES


def variants(case: Case, weights: list[str], pages: list[str]) -> list[tuple[str, str]]:
    """The formats of weights and of pages in which a case is timed. There are none if the user asked for a format other
    than the dense one, and the case has no argument with a format."""
    of_weights = weights if "weights" in case.takes else [DENSE]
    of_pages = pages if "pages" in case.takes else [DENSE]
    is_asked = DENSE in weights and DENSE in pages
    return [each for each in product(of_weights, of_pages) if is_asked or each != (DENSE, DENSE)]


def _formats(text: str, known: Iterable[str], option: str) -> list[str]:
    found = [each for each in text.split(",") if each]
    if not found or set(found) - set(known):
        raise typer.BadParameter(f"{text!r}: expected formats among {', '.join(known)}", param_hint=option)
    return found


def _place(device: str) -> torch.device:
    return torch.device("cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu"))


def main(
    op: Annotated[str, typer.Option(help="Cases or ops in this order, with commas between them; default: all.")] = "",
    model: Annotated[str, typer.Option(help="A size of the family.")] = "qwen2.5-3b",
    tokens: Annotated[str, typer.Option(help="Numbers, with commas; default: those of each case.")] = "",
    context: Annotated[str, typer.Option(help="Cached tokens per sequence in decode_attention.")] = "8192",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    weights: Annotated[str, typer.Option(help="Formats of the matrices, with commas between them.")] = DENSE,
    pages: Annotated[str, typer.Option(help="Formats of the cache's pages, with commas between them.")] = DENSE,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    provider: Annotated[str, typer.Option(help="Providers, with commas between them.")] = ALL_PROVIDERS,
    side_a: Annotated[str, typer.Option(help="Time two providers, A and B; the speed-up is B's time over A's.")] = "",
    side_b: Annotated[str, typer.Option(help="The provider B.")] = "",
    seconds: Annotated[float, typer.Option(help="Seconds for each case and size.")] = 1.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows to this file.")] = None,
    plot_folder: Annotated[Path | None, typer.Option("--plot", help="Draw pictures into this folder.")] = None,
    base: Annotated[Path | None, typer.Option(help="A stored result to compare with.")] = None,
    in_a_step: Annotated[
        bool,
        typer.Option("--where", help="Time each op of a decode step; --tokens is then its sequences."),
    ] = False,
) -> None:
    """Time the kernels next to torch, torch.compile and other libraries that are installed."""
    if in_a_step:
        where.show(model, numbers(tokens or "1"), numbers(context), _place(device), json_file, weights)
        return
    before = results.load(base) if base else []
    if bool(side_a) != bool(side_b):
        raise typer.BadParameter("--side-a and --side-b: expected both or neither")
    if dtype not in ("bfloat16", "float16", "float32"):
        raise typer.BadParameter(f"{dtype!r}: expected bfloat16, float16 or float32")
    Config.from_name(model)
    providers = _providers([side_a, side_b] if side_a else [name for name in provider.split(",") if name])
    cases, contexts = _cases(op), numbers(context)
    of_weights, of_pages = _formats(weights, WEIGHTS, "--weights"), _formats(pages, PAGES, "--pages")
    chosen_tokens = numbers(tokens) if tokens else None
    place = _place(device)
    console, limits, rows = Console(width=None if Console().is_terminal else 160), ceilings(place), []
    with console.status("timing") as status:
        for case, count in [(each, count) for each in cases for count in chosen_tokens or each.tokens]:
            contexts_of_case = contexts if case.op == "decode_attention" else contexts[:1]
            for cached, formats in product(contexts_of_case, variants(case, of_weights, of_pages)):
                status.update(f"timing {case.name}, {count} tokens, {' '.join(formats)}")
                size = Size(count, cached, getattr(torch, dtype), str(place), *formats)
                try:
                    case.bytes_moved(Config.from_name(model), size)
                except ValueError as error:
                    console.print(f"left out {case.name}: {error}")
                    continue
                rows += measure(case, model, size, providers, limits, seconds)
                if json_file:  # after each size, because the run may be interrupted
                    results.save(json_file, results.document(circumstances(place), limits, rows))
    show(console, rows, limits)
    if plot_folder:
        for file in plot(rows, limits, plot_folder):
            console.print(f"drew {file}")
    moved = results.changes(before, rows)
    for change in moved:
        console.print(f"[{'red' if change.ratio > 1 else 'green'}]{change}[/]")
    if base and not moved:
        console.print(f"no change larger than the noise since {base}")
    wrong = [row for row in rows if row.seconds is None and row.provider.startswith("qwenkern")]
    slower = [change for change in moved if change.ratio > 1 and change.row.provider.startswith("qwenkern")]
    raise typer.Exit(1 if wrong or slower else 0)


if __name__ == "__main__":
    terminal.run(terminal.command(main))
