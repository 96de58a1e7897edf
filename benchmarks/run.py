"""Times every kernel and its alternatives, and compares each with the roofline.

    python benchmarks/run.py --op add_rms_norm --tokens 1,16,512
    python benchmarks/run.py --json now.json --base benchmarks/results/nvidia-h100-80gb-hbm3/kernels.json
    python benchmarks/run.py --where --context 1024
    python benchmarks/run.py --side-a qwenkern --side-b qwenkern:my/tuned/folder

The result of each provider is compared with the float64 reference before it is timed. A wrong result of ours fails the
run. Another provider that is wrong or raises is reported and left out. Without a GPU, the ops on the CPU are timed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
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
from qwenkern.benchmarks.ops.providers import PROVIDERS, Function, Provider
from qwenkern.benchmarks.ops.timing import Ceilings, Spread, ceilings, circumstances, input_sets, side_by_side
from qwenkern.benchmarks.reports import results
from qwenkern.benchmarks.reports.results import Row
from qwenkern.cli import terminal
from qwenkern.kernels.environment import CONFIG_DIR
from qwenkern.kernels.triton import tuning

ALL_PROVIDERS = ",".join(provider.name for provider in PROVIDERS)


@torch.inference_mode()  # also for the check, because another mode or other kinds of tensors would be compiled again
def measure(
    case: Case, model: str, size: Size, providers: list[Provider], limits: Ceilings, seconds: float
) -> list[Row]:
    """The rows of one case at one size; all providers take turns."""
    config, device = Config.from_name(model), torch.device(size.device)
    key = (case.name, model, size.tokens, size.context, str(size.dtype).removeprefix("torch."))
    sets = input_sets(lambda: case.inputs(config, size), device)
    functions: dict[str, Function] = {}
    rows: list[Row] = []
    truth = expected(case, sets[0])
    for provider in providers:
        try:
            function = None if provider.gpu_only and device.type != "cuda" else provider.function(case)
            if function is None:
                continue
            if provider.same:
                check(case, function, sets[0], truth)
            else:
                function(*sets[0])
            functions[provider.name] = function
        except ImportError:
            continue  # not installed
        except Exception as error:  # that a peer fails is a result, not the end of the run
            rows.append(Row(*key, provider.name, None, error=f"{type(error).__name__}: {error}".splitlines()[0][:200]))
    calls = {name: [_bound(function, inputs) for inputs in sets] for name, function in functions.items()}
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

    return Provider(name, function)


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
        head = (row.case, str(row.tokens))
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
            console.print(f"[red]failed[/red] {row.case} x{row.tokens} {row.provider}: {row.error}", soft_wrap=True)
    if any(not row.same for row in rows):
        console.print("* work of the same size, not the same op: the matrix product only, or attention without pages")


def plot(rows: list[Row], limits: Ceilings, folder: Path) -> list[Path]:
    """Draws bandwidth over tokens, one picture per case. Needs matplotlib (the extra `bench`)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for case in dict.fromkeys(row.case for row in rows):
        figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
        mine = [row for row in rows if row.case == case and row.seconds]
        for provider in dict.fromkeys(row.provider for row in mine):
            line = sorted((row.tokens, row.bandwidth / 1e9) for row in mine if row.provider == provider)
            axes.plot(*zip(*line, strict=True), marker="o", label=provider)
        axes.axhline(limits.copy / 1e9, color="grey", linestyle="--", label="copy, measured")
        axes.set(title=f"{case}, {mine[0].model}" if mine else case, xlabel="tokens", ylabel="GB/s", xscale="log")
        axes.legend(fontsize=8)
        files.append(folder / f"{case}.png")
        figure.savefig(files[-1], dpi=120)
        pyplot.close(figure)
    return files


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


def _place(device: str) -> torch.device:
    return torch.device("cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu"))


def main(
    op: Annotated[str, typer.Option(help="Cases or ops in this order, with commas between them; default: all.")] = "",
    model: Annotated[str, typer.Option(help="A size of the family.")] = "qwen2.5-3b",
    tokens: Annotated[str, typer.Option(help="Numbers, with commas; default: those of each case.")] = "",
    context: Annotated[str, typer.Option(help="Cached tokens per sequence in decode_attention.")] = "8192",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
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
        where.show(model, numbers(tokens or "1"), numbers(context), _place(device), json_file)
        return
    before = results.load(base) if base else []
    if bool(side_a) != bool(side_b):
        raise typer.BadParameter("--side-a and --side-b: expected both or neither")
    if dtype not in ("bfloat16", "float16", "float32"):
        raise typer.BadParameter(f"{dtype!r}: expected bfloat16, float16 or float32")
    Config.from_name(model)
    providers = _providers([side_a, side_b] if side_a else [name for name in provider.split(",") if name])
    cases, contexts = _cases(op), numbers(context)
    chosen_tokens = numbers(tokens) if tokens else None
    place = _place(device)
    console, limits, rows = Console(width=None if Console().is_terminal else 160), ceilings(place), []
    with console.status("timing") as status:
        for case in cases:
            for count in chosen_tokens or case.tokens:
                for cached in contexts if case.op == "decode_attention" else contexts[:1]:
                    status.update(f"timing {case.name}, {count} tokens")
                    size = Size(count, cached, getattr(torch, dtype), str(place))
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
