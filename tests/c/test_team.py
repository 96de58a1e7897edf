"""The threads of C calls: torch's own with OpenMP, and ours without it."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qwenkern.kernels import c as c_backend
from qwenkern.kernels.c import build, ops, recorded_calls
from qwenkern.kernels.weights import Dense

X, W = (torch.randn(rows, 896, generator=torch.Generator().manual_seed(rows)).bfloat16() for rows in (40, 333))


@pytest.fixture(params=["torch's threads", "threads of ours"])
def team(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets how many threads the next calls use."""
    monkeypatch.delenv("QWENKERN_KERNELS", raising=False)
    if c_backend.library() is None:
        pytest.skip("no C compiler here")
    parallel = ctypes.c_void_p.in_dll(build.library(), "parallel")
    before = parallel.value
    if request.param == "threads of ours":
        parallel.value = None
    elif before is None:
        pytest.skip("torch uses no OpenMP here")
    yield lambda threads: monkeypatch.setattr(recorded_calls.threads, "count", lambda: threads)
    parallel.value = before


def products() -> tuple[torch.Tensor, ...]:
    """What few tokens and many give: two loops each, of more tasks than threads and of fewer."""
    return tuple(ops.linear(rows, Dense(W)) for rows in (X[:1], X[:7], X))


def equal(some: tuple[torch.Tensor, ...], others: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


def test_any_number_of_threads_gives_the_same_bits(team: Callable[[int], None]) -> None:
    team(1)
    expected = products()
    for threads in (2, 3, 8, 1, 5, 2):  # more and fewer than before: counters of earlier teams must not matter
        team(threads)
        for _ in range(20):
            assert equal(products(), expected), f"{threads} threads"


def test_callers_in_several_threads_do_not_disturb_each_other(team: Callable[[int], None]) -> None:
    team(2)
    expected, outcomes = products(), []

    def work() -> None:
        outcomes.append(all(equal(products(), expected) for _ in range(30)))

    callers = [threading.Thread(target=work) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert outcomes == [True] * 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_makes_threads_of_its_own(team: Callable[[int], None]) -> None:
    """Also where its parent used torch's: OpenMP's threads do not survive a fork."""
    team(3)
    expected = products()
    child = os.fork()
    if child == 0:
        os._exit(0 if equal(products(), expected) else 1)
    ends = time.monotonic() + 60
    while (done := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < ends:
        time.sleep(0.01)
    if done == (0, 0):
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert done == (child, 0), "the child hangs, or computes something else"
    assert equal(products(), expected)


def test_threads_that_have_nothing_to_do_sleep(team: Callable[[int], None]) -> None:
    """Processor time of threads that are not Python's: other programs and what other tests have left do not count."""
    if ctypes.c_void_p.in_dll(build.library(), "parallel").value is not None:
        pytest.skip("how long OpenMP's threads stay awake is theirs")
    team(4)
    products()
    time.sleep(0.05)
    before = spent()
    time.sleep(0.5)
    assert spent() - before < 0.1


def spent() -> float:
    """Seconds of processor time of this process, on Linux without those of Python's threads."""
    folder = Path("/proc/self/task")
    if not folder.is_dir():
        return time.process_time()
    known = {str(thread.native_id) for thread in threading.enumerate()}
    stats = [(each / "stat").read_text() for each in folder.iterdir() if each.name not in known]
    ticks = sum(sum(map(int, stat.rpartition(")")[2].split()[11:13])) for stat in stats)  # utime and stime
    return ticks / os.sysconf("SC_CLK_TCK")


def test_a_team_larger_than_the_machine_wastes_little(team: Callable[[int], None]) -> None:
    """32 threads wait for each other at every loop. If they spun, each loop would take a time slice of every thread,
    thousands of times the work. Sleeping threads take about 80 times the work."""

    def cost(threads: int) -> float:
        team(threads)
        products()
        started = time.process_time()
        for _ in range(50):
            products()
        return time.process_time() - started

    if ctypes.c_void_p.in_dll(build.library(), "parallel").value is not None:
        pytest.skip("how long OpenMP's threads stay awake is theirs")
    one, crowded = cost(1), cost(32)
    print(f"processor time of one thread {one:.3f} s, of 32 {crowded:.3f} s")
    assert crowded < 400 * one
