"""Searches the launch configurations of a decode step, each timed within the whole step.

A kernel by itself and the same kernel in a step have different best configurations. In a step, neighbouring kernels
overlap: a kernel that needs less shared memory lets the next one load its first weights early.

The search changes one field of one kernel at a time. It keeps the fastest change of a kernel and goes on to the next
kernel, again and again until no kernel changes or the time is over.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from qwenkern import Config
from qwenkern.benchmarks.models.where import STEPS, loaded_step, model_and_cache
from qwenkern.benchmarks.ops.inputs import DENSE
from qwenkern.engine.capture import GraphCapture
from qwenkern.kernels.triton import tuning
from qwenkern.kernels.triton.tuning import Kernel, Overrides
from qwenkern.kernels.weights import FORMATS

WINS = 0.998  # a change wins if its time is below this share of the best time so far; otherwise it is noise
ROUNDS = 4  # readings of a time, which is their median


@dataclass(frozen=True)
class Reading:
    """A step with a changed configuration of one kernel: its seconds, or the reason why it did not run."""

    kernel: Kernel
    changes: dict[str, int]
    seconds: float | None
    reason: str = ""


@dataclass
class Found:
    """The result of a search: the seconds before and after it, the configurations that changed, and all readings."""

    before: float
    after: float
    configs: dict[Kernel, dict[str, int]]  # the fields that the tuner may set
    tried: list[Reading] = field(default_factory=list)


def search(
    seconds: Callable[[], float],
    overrides: Overrides,
    spaces: dict[str, dict[str, tuple[int, ...]]],
    deadline: float,
    progress: Callable[[], None] = lambda: None,
) -> Found:
    """``seconds`` times a step with the configurations that ``overrides`` chooses."""
    first = seconds()
    found = Found(first, first, {})
    while True:
        before = found.after
        for kernel in list(overrides.own):
            _search_kernel(kernel, seconds, overrides, spaces.get(kernel[0], {}), deadline, progress, found)
        if found.after > WINS * before or time.monotonic() > deadline:
            for kernel, changes in overrides.chosen.items():
                if changes:
                    config = overrides.own[kernel] | changes
                    found.configs[kernel] = {name: config[name] for name in spaces[kernel[0]] if name in config}
            return found


def _search_kernel(
    kernel: Kernel,
    seconds: Callable[[], float],
    overrides: Overrides,
    space: dict[str, tuple[int, ...]],
    deadline: float,
    progress: Callable[[], None],
    found: Found,
) -> None:
    kept = overrides.chosen.get(kernel, {})
    current = overrides.own[kernel] | kept
    best = kept
    for name, values in space.items():
        for value in values:
            if name not in current or value == current[name]:
                continue
            if time.monotonic() > deadline:
                break
            overrides.chosen[kernel] = changes = kept | {name: value}
            found.tried.append(reading := _read(kernel, changes, seconds))
            if reading.seconds is not None and reading.seconds < WINS * found.after:
                found.after, best = reading.seconds, changes
            progress()
    overrides.chosen[kernel] = best
    tuning.forget()


def _read(kernel: Kernel, changes: dict[str, int], seconds: Callable[[], float]) -> Reading:
    tuning.forget()
    try:
        return Reading(kernel, changes, seconds())
    except Exception as error:  # the kernel does not compile, or does not fit
        return Reading(kernel, changes, None, f"{type(error).__name__}: {error}".splitlines()[0][:200])


@torch.inference_mode()
def tune(
    config: Config,
    sequences: Sequence[int],
    context: int,
    deadline: float,
    weights: str = DENSE,
    progress: Callable[[], None] = lambda: None,
) -> Found:
    """Searches on the current GPU, with weights of a format. The time of a step is the geometric mean over the numbers
    of sequences."""
    device = torch.device("cuda")
    model, cache = model_and_cache(config, max(sequences) * (context + 2 * STEPS + 64), device, weights)

    def seconds() -> float:
        return statistics.geometric_mean(_step_seconds(model, cache, count, context) for count in sequences)

    with tuning.overriding() as overrides:
        spaces = {tuning.named(op, form): space for op, space in tuning.SPACES.items() for form in FORMATS}
        return search(seconds, overrides, spaces, deadline, progress)


def _step_seconds(model: Any, cache: Any, sequences: int, context: int) -> float:
    step = loaded_step(model, cache, sequences, context, GraphCapture(cache.device))
    readings = []
    for _ in range(ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        step.replay()
        begin.record()
        for _ in range(STEPS // ROUNDS):
            step.replay()
        end.record()
        end.synchronize()
        readings.append(begin.elapsed_time(end) / 1e3 / (STEPS // ROUNDS))
    return statistics.median(readings)
