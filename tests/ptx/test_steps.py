"""The launches of a decode step overlap without a race under dependent launch, and the check reports races."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from ptx import on_steps
from ptx.compiling import compiling_process

from qwenkern.benchmarks.offline.ptx.faults import Fault
from qwenkern.benchmarks.offline.ptx.steps import Ran, Step

pytestmark = pytest.mark.xdist_group("ptx sm_90")


@pytest.fixture(scope="module")
def process() -> Iterator[ProcessPoolExecutor]:
    with compiling_process() as process:
        yield process


def at(*intervals: tuple[int, int]) -> np.ndarray:
    return np.array(intervals, np.int64).reshape(-1, 2)


def ran(how: str) -> Ran:
    """Launched as usual (-), or dependently: it lets the next one start before it has waited (<), or after (>)."""
    return Ran("k", how != "-", how == ">", [])


@pytest.mark.parametrize(
    ("launches", "ended"),
    [
        ("---", [0, 1, 2]),
        ("-<", [0, 0]),
        ("--<", [0, 1, 1]),  # the one before the last has ended
        ("-<<<", [0, 0, 0, 0]),
        ("--<<>", [0, 1, 1, 1, 1]),
        ("-<><<", [0, 0, 0, 2, 2]),
        ("->>>", [0, 0, 1, 2]),
        ("-<-<", [0, 0, 2, 2]),
    ],
)
def test_what_has_ended(launches, ended):
    step = Step()
    step.ran = [ran(how) for how in launches]
    for launch in step.ran:
        launch.waits_first |= not launch.is_dependent
    assert step.ended() == ended


@pytest.mark.parametrize(
    ("reads", "writes", "early", "common"),
    [
        ([], [(0, 8)], [(0, 8)], True),
        ([], [(8, 16)], [(0, 8)], False),
        ([], [(0, 100), (4, 8), (200, 201)], [(90, 91)], True),
        ([], [(0, 4), (12, 16)], [(4, 12), (16, 20)], False),
        ([(0, 8)], [], [(0, 8)], False),
    ],
)
def test_what_is_read_early_must_not_be_written(reads, writes, early, common):
    step = Step()
    step.ran = [
        Ran("first", True, False, [], reads=at(*reads), writes=at(*writes)),
        Ran("second", True, False, [(0, 300, "x")], early_reads=at(*early), reads=at(*early)),
    ]
    assert bool(step.hazards()) == common
    if common:
        with pytest.raises(Fault, match=r"second \(launch 1\) reads before its wait byte \d+ of the storage of x"):
            step.check()


W, X = "w", "a"  # nobody writes these
LATE, EARLY = False, True
SEQUENCES = [
    ("weights before the wait", [("b", X, W, EARLY, False), ("c", "b", W, EARLY, False)], None),
    (
        "what the kernel before writes",
        [("b", X, W, EARLY, False), ("c", X, "b", EARLY, False)],
        " of early_ptr",
    ),
    (
        "what the one before that writes",
        [("b", X, W, EARLY, False), ("c", X, W, EARLY, False), ("d", X, "b", EARLY, False)],
        r"\(launch 2\) reads before its wait byte 0 of the storage of early_ptr, which _kernel \(launch 0\) writes",
    ),
    (
        "it has ended if the one between waited first",
        [("b", X, W, EARLY, False), ("c", X, W, LATE, False), ("d", X, "b", EARLY, False)],
        None,
    ),
    (
        "written while it is read",
        [("b", X, W, EARLY, False), (X, "b", W, EARLY, True)],
        "writes before its wait",
    ),
    ("written twice", [("b", X, W, EARLY, False), ("b", X, W, EARLY, True)], "writes before its wait"),
    ("what torch writes", [("w",), ("b", X, W, EARLY, False)], r"which aten.add_.Tensor \(launch 0\) writes"),
    ("what torch wrote before the last", [("w",), ("e",), ("b", X, W, EARLY, False)], None),
    ("torch waits for all", [("b", X, W, EARLY, False), ("e",), ("c", X, "b", EARLY, False)], None),
]


@pytest.mark.parametrize(("launches", "hazard"), [each[1:] for each in SEQUENCES], ids=[each[0] for each in SEQUENCES])
def test_sequences(process, launches, hazard):
    found = process.submit(on_steps.sequence, *launches).result()
    if hazard is None:
        assert found == []
    else:
        (text,) = found
        assert re.search(hazard, text), text


def test_settled_arguments_may_be_read_before_the_wait(process):
    assert process.submit(on_steps.alone, ("early_ptr",)).result() == [3.0] * 32
    with pytest.raises(Fault, match=r"reads global memory before griddepcontrol.wait .*on_steps.py"):
        process.submit(on_steps.alone, ("x_ptr",)).result()


@pytest.mark.slow
def test_a_decode_step_may_overlap_as_it_does(process):
    """And no kernel of it may read or write before its wait what it reads or writes behind it."""
    step = Step(process.submit(on_steps.decode_steps).result())
    assert step.hazards() == []
    kernels = [at for at, launch in enumerate(step.ran) if launch.is_dependent]
    assert len(kernels) >= 2 * (2 * 4 + 2)  # two steps of two layers and of their end
    for at in kernels[1:]:
        launch = step.ran[at]
        early = replace(launch, early_reads=launch.reads, early_writes=launch.writes)
        changed = Step([*step.ran[:at], early, *step.ran[at + 1 :]])
        assert any(hazard.startswith(f"{launch.name} (launch {at}) ") for hazard in changed.hazards())


@pytest.mark.slow
def test_a_wait_at_the_end_of_a_kernel_is_noticed(process):
    step = Step(process.submit(on_steps.decode_steps, "_decode_attention_kernel").result())
    first = next(hazard for hazard in step.hazards() if "_norm_qkv_rope_kernel" in hazard)
    reads = r"_decode_attention_kernel \(launch \d+\) reads before its wait byte \d+ of the storage of (q_ptr|pages),"
    assert re.match(reads, first)
