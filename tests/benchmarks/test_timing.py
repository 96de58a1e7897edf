"""Readings alternate between functions, on inputs that are not in the cache, and on a GPU use a CUDA graph if
possible."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from qwenkern import Config
from qwenkern.benchmarks.ops import timing
from qwenkern.benchmarks.ops.cases import CASES, Size
from qwenkern.benchmarks.ops.timing import Spread


def test_spreads():
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0)
    assert Spread.of([float(value) for value in range(11)]) == Spread(2.0, 5.0, 8.0)


def test_functions_are_read_in_turns():
    order = []
    readings = timing.side_by_side(
        {"a": [lambda: order.append("a")], "b": [lambda: order.append("b")]}, torch.device("cpu"), 0.0
    )
    assert "".join(order) == "ab" + "abbaab"
    assert len(readings["a"]) == len(readings["b"]) == 3


def test_no_two_functions_are_on_the_same_inputs():
    seen = []
    calls = {name: [lambda at=at, name=name: seen.append((name, at)) for at in range(4)] for name in "ab"}
    timing.side_by_side(calls, torch.device("cpu"), 0.0)
    rounds = [sorted(seen[at : at + 2]) for at in range(0, len(seen), 2)]
    assert all(first[1] != second[1] for first, second in rounds)


def test_inputs_exceed_the_cache():
    config, size = Config.from_name("qwen2.5-0.5b"), Size(16, device="cpu")
    down = next(case for case in CASES if case.name == "down")
    sets = timing.input_sets(lambda: down.inputs(config, size), torch.device("cpu"))
    total = sum(each.nbytes for inputs in sets for each in inputs if isinstance(each, torch.Tensor))
    assert total >= 64 << 20
    assert sets[0][0].data_ptr() != sets[1][0].data_ptr()


def test_ceilings_of_this_machine():
    found = timing.ceilings(torch.device("cpu"))
    assert 1e8 < found.copy < 1e13
    assert 1e8 < found.matrix < 1e15


class Cuda:
    """What a reading uses of torch.cuda, where a capture that fails leaves its stream and the random generator behind,
    as in torch 2.11."""

    def __init__(self):
        self.home = self.stream_now = SimpleNamespace(wait_stream=lambda other: None, device="cpu")
        self.mode, self.modes, self.captures, self.replays, self.generator_captures = 0, [], 0, 0, False

    def Stream(self):
        return SimpleNamespace(wait_stream=lambda other: None, device="cpu")

    def Event(self, enable_timing):
        return SimpleNamespace(record=lambda: None, synchronize=lambda: None, elapsed_time=lambda end: 1.0)

    def CUDAGraph(self):
        return SimpleNamespace(replay=self.replay)

    def replay(self):
        self.replays += 1

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.stream_now = self.stream_now, stream
        try:
            yield
        finally:
            self.stream_now = before

    @contextlib.contextmanager
    def graph(self, graph, stream=None, capture_error_mode="global"):
        before, self.stream_now = self.stream_now, stream
        self.captures, self.generator_captures = self.captures + 1, True
        yield
        self.stream_now, self.generator_captures = before, False

    def current_stream(self):
        return self.stream_now

    def set_stream(self, stream):
        self.stream_now = stream

    def synchronize(self):
        pass

    def get_sync_debug_mode(self):
        return self.mode

    def set_sync_debug_mode(self, mode):
        self.mode = mode

    def launch(self):
        self.modes.append(self.mode)

    def copy(self):
        """An operation of which torch knows that it waits for the host."""
        self.launch()
        if self.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    def break_capture(self):
        """An operation that torch learns only during the capture not to be capturable."""
        if self.generator_captures:
            raise RuntimeError("operation not permitted when stream is capturing")


@pytest.fixture
def cuda(monkeypatch):
    monkeypatch.setattr(torch, "cuda", made := Cuda())
    return made


def test_a_graph_is_read_after_a_warm_up_in_which_nothing_waits(cuda):
    read = timing._gpu_reader([cuda.launch], 0.0)
    assert cuda.modes == [0, "error", "error", 0], "what compiles may wait, and so may a capture's end"
    assert cuda.mode == 0
    before = cuda.replays
    assert read() == 1e-3
    assert (cuda.captures, cuda.replays, len(cuda.modes)) == (1, before + 1, 4)


def test_what_waits_for_the_host_is_never_captured(cuda):
    with pytest.warns(UserWarning, match="timed call by call, including the host"):
        read = timing._gpu_reader([cuda.copy], 0.0)
    before = len(cuda.modes)
    read()
    assert len(cuda.modes) == before + 1
    assert (cuda.captures, cuda.replays, cuda.mode) == (0, 0, 0)
    assert cuda.stream_now is cuda.home


def test_a_capture_that_fails_leaves_nothing_behind(cuda):
    with pytest.warns(UserWarning, match="not permitted when stream is capturing"):
        timing._gpu_reader([cuda.break_capture], 0.0)
    assert cuda.captures == 2, "the second one resets the generator"
    assert not cuda.generator_captures
    assert cuda.stream_now is cuda.home


@pytest.mark.parametrize(
    ("set_to", "described", "said"), [("abc", "def", "abc"), (None, "def", "def"), (None, "", "unknown")]
)
def test_a_result_names_its_commit(monkeypatch, set_to, described, said):
    monkeypatch.delenv("QWENKERN_COMMIT", raising=False)
    if set_to:
        monkeypatch.setenv("QWENKERN_COMMIT", set_to)
    monkeypatch.setattr(timing, "_output", lambda *command: described if command[0] == "git" else "")
    assert timing.circumstances(torch.device("cpu"))["commit"] == said
