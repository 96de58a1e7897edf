"""Compiles kernels and captures steps before the first request, so that no request waits for either.

    sizes ─► child processes compile the kernels into Triton's cache ─► rehearsals: requests without a caller
             (on a GPU, once per machine)                              load the kernels, and capture the steps

A child process runs the layers on meta tensors, so it needs neither the GPU nor the weights. Two layers with the same
formats launch the same kernels as more layers.
"""

from __future__ import annotations

import base64
import hashlib
import os
import pickle
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cache import Batch, PagedCache
from ..config import Config
from ..kernels import dependent_launches
from ..kernels.dispatch import is_served
from ..kernels.environment import CONFIG_DIR, KERNELS
from ..kernels.pages import FORMATS as PAGES
from ..kernels.weights import as_weight
from ..qwen2 import Qwen2
from ..sampling import Drawing, SamplingParams
from .capture import CallCapture, Capture, Replay
from .captured_prefill import MOST_PROMPTS
from .captured_step import CapturedStep

MOST_PROCESSES = 8  # each takes about 400 MB
PACKAGE = Path(__file__).parents[1]
CHILD = "import sys; sys.path[:] = filter(None, sys.path); from qwenkern.engine.warm_up import main; main()"


class Prompts(NamedTuple):
    """The sizes of a forward pass over prompts."""

    tokens: int
    sequences: int
    rows: int  # of logits


class Layout(NamedTuple):
    """The weight of a linear, without its values."""

    name: str  # of the linear
    format: str
    tensors: tuple[tuple[tuple[int, ...], torch.dtype], ...]


def layouts(model: Qwen2) -> tuple[Layout, ...]:
    """The linears of a model with the same kernels, in as few layers as possible: two of each kind."""
    of_layers: dict[str, list[Layout]] = {}  # by the layer's number; "" for embedding and output
    for name, linear in model.linears().items():
        in_layer = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name)
        layer, rest = in_layer.groups() if in_layer else ("", name)
        tensors = tuple((tuple(tensor.shape), tensor.dtype) for tensor in linear.value.tensors)
        of_layers.setdefault(layer, []).append(Layout(rest, linear.format, tensors))
    ends = of_layers.pop("", [])
    kinds = list(dict.fromkeys(map(tuple, of_layers.values())))
    layers = [
        layout._replace(name=f"model.layers.{i}.{layout.name}") for i, kind in enumerate(2 * kinds) for layout in kind
    ]
    return (*ends, *layers)


class RunOnce(CallCapture):
    """Runs the function once instead of capturing it, as a GPU does before a capture."""

    def capture(self, function: Callable[[], Tensor], has_run: bool = False) -> tuple[Replay, Tensor]:
        with dependent_launches({}):
            out = function()
        return _nothing, out


def _nothing() -> None:
    """Replaces a replay."""


@dataclass(frozen=True)
class Task:
    """The input of a child process: descriptions of a model, a device and the forward passes to compile."""

    config: Config
    dtype: torch.dtype
    weights: tuple[Layout, ...]
    pages: str
    page_size: int
    device: Any  # kernels.triton.tuning.Device
    sizes: tuple[int, ...]  # of decode steps
    drawings: tuple[Drawing, ...]  # compiled for each of the sizes
    prompts: tuple[Prompts, ...]

    def run(self) -> None:
        """Runs the forward passes on meta tensors. Within kernels.triton.offline.compiling this compiles their
        kernels."""
        meta, context = torch.device("meta"), self.config.context_length
        layers = {layout.name.split(".")[2] for layout in self.weights if layout.name.startswith("model.layers.")}
        model = Qwen2(replace(self.config, num_hidden_layers=len(layers)), self.dtype, meta, allocated=False)
        for layout in self.weights:
            tensors = [torch.empty(shape, dtype=dtype, device=meta) for shape, dtype in layout.tensors]
            model.get_submodule(layout.name).value = as_weight(tensors, layout.format)
        cache = PagedCache(model.config, context, self.dtype, meta, self.page_size, PAGES[self.pages])
        for size, drawing in product(self.sizes, self.drawings):
            CapturedStep(model, cache, size, drawing, RunOnce())
        for tokens, sequences, rows in self.prompts:
            ids, positions, slots = (torch.empty(tokens, dtype=torch.int64, device=meta) for _ in range(3))
            tables = torch.empty(sequences, -(-context // self.page_size), dtype=torch.int32, device=meta)
            lengths, starts = (torch.empty(sequences + more, dtype=torch.int32, device=meta) for more in (0, 1))
            batch = Batch(ids, positions, slots, tables, lengths, starts, is_decode=False)
            with dependent_launches(on=False), torch.inference_mode():
                model(batch, cache, torch.empty(rows, dtype=torch.int64, device=meta))


def decode_sizes(capture: Capture, most: int) -> list[int]:
    """The numbers of sequences up to ``most`` with a captured step of their own, the largest first."""
    return sorted({size for count in range(1, most + 1) if (size := capture.padded(count))}, reverse=True)


def prompt_lengths(capture: Capture, most: int) -> list[int]:
    """The lengths of the captured forward passes over prompts of up to ``most`` tokens."""
    found: list[int] = []
    while (length := capture.padded_prompt(found[-1] + 1 if found else 1)) and (not found or found[-1] < most):
        found.append(length)
    return found


def compile_kernels(
    model: Qwen2,
    cache: PagedCache,
    sizes: Sequence[int],
    drawings: Sequence[Drawing],
    lengths: Sequence[int],
    most: int,
) -> None:
    """Compiles kernels in child processes: those of decode steps with these sizes and drawings, and those of forward
    passes over prompts of these lengths and of ``most`` tokens.

    Does nothing without a GPU, with QWENKERN_KERNELS=reference, or if the kernels are compiled already. If a child
    fails, a warning has its error, and the kernels are compiled when they are first launched."""
    if cache.device.type != "cuda" or KERNELS.get() == "reference" or not is_served("cuda"):
        return
    from ..kernels.triton import tuning

    norm = model.model.norm.weight
    prompts = [Prompts(length, MOST_PROMPTS + 1, MOST_PROMPTS) for length in lengths]
    if not lengths or most > lengths[-1]:
        prompts.append(Prompts(most, 1, 1))
    task = Task(
        model.config,
        norm.dtype,
        layouts(model),
        cache.pages[0].format,
        cache.page_size,
        tuning.device_of(norm),
        tuple(sizes),
        tuple(drawings),
        tuple(prompts),
    )
    stamp = _stamp(task)
    if not stamp.exists() and _compiled(task):
        stamp.touch()


def _compiled(task: Task) -> bool:
    """Whether all children have compiled their shares."""
    paths = [str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TRITON_CACHE_DIR": str(_triton_cache())}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    described, shares = base64.b64encode(pickle.dumps(task)).decode(), min(MOST_PROCESSES, cores)
    children: list[subprocess.Popen] = []
    with tempfile.TemporaryFile("w+") as errors:
        try:
            for share in range(shares):
                command = [sys.executable, "-c", CHILD, str(share), str(shares), described]
                child = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors, env=environment
                )
                children.append(child)
            failed = [code for child in children if (code := child.wait())]
        finally:
            for child in children:  # some are left after Ctrl-C, or if the system could not start another process
                if child.poll() is None:
                    child.kill()
                    child.wait()
        if failed:
            errors.seek(0)
            last = (errors.read().strip().splitlines() or [f"code {failed[0]}"])[-1]
            warnings.warn(
                f"qwenkern: kernels could not be compiled in advance; each is compiled at its first launch: {last}",
                stacklevel=5,
            )
        return not failed


def main() -> None:
    """The program of a child process. Its arguments: the number of its share, the number of shares, and the task."""
    from ..kernels.triton.offline import compiling

    share, shares, described = sys.argv[1:]
    torch.set_num_threads(1)
    task: Task = pickle.loads(base64.b64decode(described))
    with compiling(task.device, int(share), int(shares)):
        task.run()


def _triton_cache() -> Path:
    import triton

    return Path(triton.knobs.cache.dir)


def _stamp(task: Task) -> Path:
    """An empty file in Triton's cache. It exists if the kernels of a task are compiled. Its name depends on the task,
    the kernels, their tuned configurations, and Triton's version."""
    import triton

    digest = hashlib.sha256(f"{triton.__version__} {task}".encode())
    tuned = Path(CONFIG_DIR.get() or PACKAGE / "kernels" / "triton" / "tuned")
    for file in [*sorted((PACKAGE / "kernels").rglob("*.py")), *sorted(tuned.rglob("*.json"))]:
        digest.update(file.read_bytes())
    return _triton_cache() / f"qwenkern-{digest.hexdigest()}"


GREEDY = SamplingParams(max_tokens=3, temperature=0, repetition_penalty=1.0, ignore_eos=True)
BY_DEFAULT = SamplingParams(max_tokens=3, ignore_eos=True)  # the checkpoint's sampling settings


def rehearsals(
    sizes: Sequence[int], most_sequences: int, ways: Sequence[SamplingParams], lengths: Sequence[int], most: int
) -> Iterator[tuple[int, SamplingParams]]:
    """Requests that make the model capture all steps, each as the number of prompt tokens and its parameters. Each
    length comes twice, because the second forward pass is captured. Then each number of sequences decodes after a short
    prompt."""
    one = replace(GREEDY, max_tokens=1)
    for length in lengths:
        for turn in range(2):  # each with a salt of its own, so that nothing is found in the cache
            yield length, replace(one, cache_salt=f"warm up {length} {turn}")
    if not lengths or most > lengths[-1]:
        yield most, one
    for how, size in product(ways, sizes):
        yield 1, replace(how, n=min(size, most_sequences))
