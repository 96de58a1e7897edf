"""Measures the decode speed while other processes are busy, or while a second copy decodes, as a share of the speed on
the idle machine."""

from __future__ import annotations

import contextlib
import multiprocessing
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

from qwenkern.benchmarks.reports.results import middle_and_ends

# A busy process, on its own core if the system allows it. It ends when its parent ends.
SPIN = """
import os, sys
if hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(sys.argv[1]) % len(cores)]})
parent = os.getppid()
print("spins", flush=True)
while os.getppid() == parent:
    for _ in range(1_000_000):
        pass
"""
Rate = Callable[[], float]  # takes one reading, in tokens per second


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Runs ``count`` busy processes, one per core, within the block."""
    children = []
    try:
        for number in range(count):
            command = [sys.executable, "-c", SPIN, str(number)]
            children.append(subprocess.Popen(command, stdout=subprocess.PIPE))
        for child in children:
            assert child.stdout
            child.stdout.readline()
        yield
    finally:
        for child in children:
            child.kill()
            child.communicate()


def calm_and_busy(engines: dict[str, Rate], count: int, repeats: int) -> list[dict[str, Any]]:
    """Tokens per second on the idle machine and with ``count`` busy processes, alternately. The share is that within a
    round."""
    calm: dict[str, list[float]] = {name: [] for name in engines}
    disturbed: dict[str, list[float]] = {name: [] for name in engines}
    for read in engines.values():
        read()  # warms up
    for _ in range(repeats):
        for name, read in engines.items():
            calm[name].append(read())
            with busy(count):
                disturbed[name].append(read())
    return [_row(name, calm[name], disturbed[name]) for name in engines]


def alone_and_together(pairs: dict[str, tuple[Rate, Rate]], repeats: int) -> list[dict[str, Any]]:
    """Tokens per second of each of two processes, alternately while the other one waits and while both decode."""
    rows = []
    for name, pair in pairs.items():
        alone: tuple[list[float], list[float]] = ([], [])
        together: tuple[list[float], list[float]] = ([], [])
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda read: read(), pair))  # warms up
            for _ in range(repeats):
                for readings, read in zip(alone, pair, strict=True):
                    readings.append(read())
                for readings, rate in zip(together, pool.map(_second_of_three, pair), strict=True):
                    readings.append(rate)
        rows += [_row(f"{name}, process {at + 1}", alone[at], together[at]) for at in range(2)]
    return rows


def _second_of_three(read: Rate) -> float:
    """The second of three readings, so that the other process decodes during all of it."""
    return [read() for _ in range(3)][1]


def _row(name: str, calm: list[float], disturbed: list[float]) -> dict[str, Any]:
    shares = [less / full for less, full in zip(disturbed, calm, strict=True)]
    return {
        "engine": name,
        "calm_tokens_per_second": middle_and_ends(calm),
        "tokens_per_second": middle_and_ends(disturbed),
        "share": middle_and_ends(shares),
    }


@contextlib.contextmanager
def process(make: Callable[..., Rate], *given: Any) -> Iterator[Rate]:
    """Runs the engine that ``make(*given)`` makes in a process of its own, which ends with the block. Yields a function
    that takes a reading. The function raises RuntimeError if the reading fails in the process."""
    context = multiprocessing.get_context("spawn")
    mine, its = context.Pipe()
    worker = context.Process(target=_serve, args=(its, make, given), daemon=True)
    worker.start()
    its.close()

    def read() -> float:
        try:
            mine.send(None)
            answer = mine.recv()
        except (EOFError, ConnectionError):
            worker.join(10)
            answer = f"its process ended with {worker.exitcode}"
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return float(answer)

    try:
        yield read
    finally:
        mine.close()
        worker.join(10)
        worker.kill()


def _serve(connection: Connection, make: Callable[..., Rate], given: tuple[Any, ...]) -> None:
    with contextlib.suppress(EOFError, ConnectionError):  # the parent has closed the pipe
        try:
            read = make(*given)
            while True:
                connection.recv()
                connection.send(read())
        except (RuntimeError, ImportError, OSError, ValueError) as error:
            if isinstance(error, ConnectionError):
                raise
            connection.send(f"{type(error).__name__}: {error}")
