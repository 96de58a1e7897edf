"""Times several functions alternately, on inputs that are not in the cache, and measures the device's limits.

On a GPU, the calls over all input sets are captured in a CUDA graph and replayed, so that the host's time does not
count. A function that waits for the host cannot be captured. It is timed call by call between events. On a CPU, the
clock is read around each call.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import platform
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton

import qwenkern
from qwenkern.kernels import Pages, Weight, dependent_launches
from qwenkern.kernels.environment import COMMIT

Calls = Sequence[Callable[[], Any]]  # one function on each set of inputs
LEAST_SECONDS = 200e-6  # the shortest reading on a GPU: well above the resolution of its clock


@dataclass(frozen=True)
class Spread:
    """Percentiles of repeated readings."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, readings: Sequence[float]) -> Spread:
        if len(readings) == 1:
            return cls(readings[0], readings[0], readings[0])
        tenths = statistics.quantiles(readings, n=10, method="inclusive")
        return cls(tenths[1], tenths[4], tenths[7])


def side_by_side(calls: Mapping[str, Calls], device: torch.device, seconds: float = 1.0) -> dict[str, list[float]]:
    """The readings of each function, in seconds per call. All readings take about ``seconds``. A round takes one
    reading of every function, so that ratios can be computed within a round. Each round begins with another function,
    so that no function always follows the same one."""
    make = _gpu_reader if device.type == "cuda" else _cpu_reader
    readers = {name: make(each, index / len(calls)) for index, (name, each) in enumerate(calls.items())}
    for read in readers.values():
        read()
    readings: dict[str, list[float]] = {name: [] for name in calls}
    end, order = time.perf_counter() + seconds, list(readers)
    while time.perf_counter() < end or len(readings[order[0]]) < 3:
        for name in order:
            readings[name].append(readers[name]())
        order.append(order.pop(0))
    return readings


def _cpu_reader(calls: Calls, share: float) -> Callable[[], float]:
    turn = int(share * len(calls))  # in a round, each function begins with another set of inputs

    def read() -> float:
        nonlocal turn
        turn += 1
        started = time.perf_counter()
        calls[turn % len(calls)]()
        return time.perf_counter() - started

    return read


def _gpu_reader(calls: Calls, share: float) -> Callable[[], float]:
    def run() -> None:
        for call in calls:
            call()

    stream = torch.cuda.Stream()
    kept: dict[Any, torch.Tensor] = {}
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), dependent_launches(kept):
        run()  # the first call compiles, loads, allocates, and chooses algorithms
    try:
        with torch.cuda.stream(stream), dependent_launches(kept), _waiting_raises():
            for _ in range(2):
                run()
        with dependent_launches(kept):
            run = _captured(run, stream)
    except RuntimeError as error:
        torch.cuda.synchronize()
        warnings.warn(f"timed call by call, including the host, because it cannot be captured: {error}", stacklevel=2)
    once = _between_events(run, 3)
    repeats = max(1, round(LEAST_SECONDS / max(once, 1e-7)))

    def read(kept: Any = kept) -> float:  # the replay uses the kept tensors, so they live as long
        return _between_events(run, repeats) / len(calls)

    return read


@contextlib.contextmanager
def _waiting_raises() -> Iterator[None]:
    """Within the block, an operation that waits for the GPU raises RuntimeError, if torch knows that it waits."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _captured(run: Callable[[], Any], stream: torch.cuda.Stream) -> Callable[[], None]:
    """Captures what ``run`` launches and returns the replay. Raises RuntimeError, and leaves torch as it was, if it
    cannot be captured."""
    home, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="relaxed"):
            run()
    except RuntimeError:
        torch.cuda.set_stream(home)  # a capture that fails at its end leaves its stream current
        with torch.cuda.graph(torch.cuda.CUDAGraph()):  # and random numbers fail until another capture succeeds
            torch.ones(1, device=stream.device)
        raise
    return graph.replay


def _between_events(run: Callable[[], Any], repeats: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def input_sets(make: Callable[[], tuple[Any, ...]], device: torch.device, most: int = 16) -> list[tuple[Any, ...]]:
    """Sets of inputs that together are twice as large as the last cache, so that each call finds its inputs evicted."""
    sets = [make()]
    size = sum(each.nbytes for each in sets[0] if isinstance(each, (torch.Tensor, Weight, Pages)))
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 32 << 20
    while len(sets) < most and len(sets) * size < 2 * cache:
        sets.append(make())
    return sets


@dataclass(frozen=True)
class Ceilings:
    """The limits of this device, measured in the same run."""

    copy: float  # bytes per second, read plus written
    matrix: float  # operations per second of a large bfloat16 product


@functools.cache
def ceilings(device: torch.device) -> Ceilings:
    gpu = device.type == "cuda"
    source = torch.ones((2 << 30) if gpu else (1 << 28), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    size = 8192 if gpu else 512
    # random values, because a GPU that toggles fewer bits draws less power and runs faster
    left, right = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    calls: dict[str, Callable[[], Any]] = {"copy": lambda: target.copy_(source), "matrix": lambda: left @ right}
    if gpu:  # without a graph: in a graph the copy is a memcpy node, which reached 2.4, not 3.0 TB/s on an H100
        best = {name: min(_between_events(call, 3) for _ in range(10)) for name, call in calls.items()}
    else:
        readings = side_by_side({name: [call] for name, call in calls.items()}, device, 0.5)
        best = {name: min(each) for name, each in readings.items()}
    return Ceilings(2 * source.nbytes / best["copy"], 2 * size**3 / best["matrix"])


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()}, {torch.get_num_threads()} threads"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def circumstances(device: torch.device) -> dict[str, Any]:
    """The facts that every result must name: device, versions, commit and date."""
    found = {
        "device": device_name(device),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "qwenkern": qwenkern.__version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }
    return {name: value for name, value in found.items() if value}


def _commit() -> str:
    """The commit of the checkout. If the checkout has no .git, QWENKERN_COMMIT may name it."""
    described = _output("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty")
    return COMMIT.get() or described or "unknown"


def _output(*command: str) -> str:
    """The output of a program; empty if the program is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
