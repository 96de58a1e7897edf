"""Compiles the kernels that on_gpu.py launches, on a machine without the GPU, into one file for the machine with it.

    python benchmarks/carry.py --out kernels.tar.xz                       for an H100: benchmarks and GPU tests
    python benchmarks/on_gpu.py --out results --kernels kernels.tar.xz    on the machine with the GPU

Both machines need the same version of Triton. The second machine compiles a kernel that the file lacks. The launches of
the benchmarks are recorded on meta tensors, those of the tests on a CPU, without comparing results
(tests/support/compile_only.py).
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import torch
import triton
import typer
from rich.console import Console

from qwenkern import Config
from qwenkern.benchmarks.offline.carried import compiling, pack
from qwenkern.benchmarks.offline.machine_code import DEVICES
from qwenkern.benchmarks.on_gpu import kernel_tests
from qwenkern.benchmarks.ops.cases import CASES, Size
from qwenkern.cache import BlockTable, PagedCache
from qwenkern.cli import terminal
from qwenkern.engine.capture import CallCapture, Replay
from qwenkern.engine.captured_step import CapturedStep
from qwenkern.kernels.environment import KERNELS
from qwenkern.qwen2 import Qwen2
from qwenkern.sampling import Drawing

TESTS = Path(__file__).resolve().parents[1] / "tests"
META = torch.device("meta")
STEPS = tuple(itertools.product((1, 16), (None, Drawing())))  # decode steps of end_to_end.py and where.py
PROMPTS = ((1, 128), (1, 2048), (16, 128), (2, 2048))  # sequences, and tokens of each, of a forward pass


class Traced(CallCapture):
    """Runs the step once, without capturing it."""

    def capture(self, function: Callable[[], torch.Tensor], has_run: bool = False) -> tuple[Replay, torch.Tensor]:
        return lambda: None, function()


def launch_case(model: str, name: str, tokens: int) -> None:
    case = next(case for case in CASES if case.name == name)
    case.run(*case.inputs(Config.from_name(model), Size(tokens, device="meta")))


@torch.inference_mode()
def launch_model(model: str) -> None:
    """Decode steps and prompts, with two layers, which launch the same kernels as more layers."""
    fields = vars(Config.from_name(model))
    config = Config(**fields | {"num_hidden_layers": 2})
    module = Qwen2(config, torch.bfloat16, META)
    cache = PagedCache(config, 1 << 17, torch.bfloat16, META)
    for rows, drawing in STEPS:
        CapturedStep(module, cache, rows, drawing, Traced())
    for sequences, tokens in PROMPTS:
        parts = [(BlockTable(), [0] * tokens) for _ in range(sequences)]
        last = torch.arange(sequences, device=META)
        module(cache.batch(parts), cache, last)


def compile_task(arch: str, folder: str, dependent: tuple[bool, ...], task: tuple[str, ...]) -> int:
    """Runs one of the functions above, by its name. Returns the number of kernels that it launched."""
    name, *arguments = task
    with compiling(DEVICES[arch], dependent, Path(folder)) as names:
        {"case": launch_case, "model": launch_model}[name](*arguments)  # type: ignore[operator]
    return len(names)


def compile_tests(arch: str, folder: str, jobs: int) -> str:
    """Runs the kernels' tests with the plugin compile_only. Returns pytest's last line. Failures do not matter."""
    environment = os.environ | {"TRITON_INTERPRET": "0", KERNELS.name: "triton", "PYTHONPATH": _path()}
    environment |= {"COMPILE_ONLY_FOR": arch, "COMPILE_ONLY_INTO": folder}
    command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-p", "support.compile_only", "-p", "no:cacheprovider"]
    command += ["-n", str(jobs), *kernel_tests()]
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, check=False)
    return (done.stdout.strip() or done.stderr).splitlines()[-1]


def _path() -> str:
    return os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))


def main(
    out: Annotated[Path, typer.Option(help="The file to write.")],
    arch: Annotated[str, typer.Option(help=f"Of {', '.join(DEVICES)}.")] = "sm_90",
    model: Annotated[str, typer.Option(help="A size of the family.")] = "qwen2.5-3b",
    tests: Annotated[bool, typer.Option(help="Also what the GPU tests launch.")] = True,
    jobs: Annotated[int, typer.Option(help="Processes.")] = os.cpu_count() or 1,
) -> None:
    """Compile the kernels that on_gpu.py launches, to carry them to a machine with the GPU."""
    if arch not in DEVICES:
        raise typer.BadParameter(f"{arch}: not among {', '.join(DEVICES)}", param_hint="--arch")
    if triton.knobs.runtime.interpret:
        raise typer.BadParameter("TRITON_INTERPRET=1 is set, so kernels are not compiled; expected it to be unset")
    os.environ.pop(KERNELS.name, None)
    both = (True, False) if DEVICES[arch].capability >= 90 else (False,)
    tasks = [("case", model, case.name, tokens) for case in CASES for tokens in case.tokens] + [("model", model)]
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            given = itertools.repeat(arch), itertools.repeat(folder), itertools.repeat(both), tasks
            console.print(f"benchmarks: {sum(pool.map(compile_task, *given))} launches")
        if tests:
            console.print(f"tests: {compile_tests(arch, folder, jobs)}")
        count = pack(Path(folder), out)
    console.print(
        f"{count} kernels, {out.stat().st_size / 1e6:.1f} MB, for {arch} and Triton {triton.__version__}: {out}"
    )


if __name__ == "__main__":
    terminal.run(terminal.command(main))
