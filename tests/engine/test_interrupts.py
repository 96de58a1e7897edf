"""An exception at any line, and between any two bytecodes, of the code that runs in a caller's thread, and of an engine
that is stepped by hand: no request goes on, no page is lost, and the model works afterwards.

Each scenario runs once to list the places in the code that it reaches. Then it runs again for MOST of these places,
with a KeyboardInterrupt raised there. With MOST = None, all places are tried, which takes a quarter of an hour. Nothing
is raised in the thread of a model's own engine, because signals are handled in the main thread."""

from __future__ import annotations

import dis
import functools
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
from engine.test_decode import Fake, NotCaptured
from support.clockwork import clockwork
from support.engines import check_pages, read

import qwenkern
from qwenkern.engine import Engine, Limits
from qwenkern.engine.captured_step import CapturedStep

FILES = {
    str(file)
    for pattern in ("Model.py", "engine/*.py", "cache/*.py", "sampling/*.py")
    for file in Path(qwenkern.__file__).parent.glob(pattern)
}
FINALIZERS = ("__del__", "_give_back")  # Python ignores exceptions in them
LONG, SHORT = [n * 7 % 64 for n in range(70)], [5, 6, 7]
HOW = {"ignore_eos": True, "temperature": 0}
MOST: int | None = 100  # random lines, and as many random bytecodes, of each scenario


def lists(model) -> None:
    """More prompts than the cache holds. Completions fork, some find no free pages, and one request grows."""
    model.generate([LONG, SHORT, LONG[:63]], n=2, max_tokens=3, seed=1, temperature=1.0, ignore_eos=True, logprobs=1)


def streams(model) -> None:
    """Two open streams. One is closed before its end."""
    with model.stream(LONG, max_tokens=60, **HOW) as one, model.stream(LONG[1:], max_tokens=60, **HOW) as two:
        for stream in (one, two, one):
            read(stream, 2)
        model.score(LONG + LONG)
        two.close()
        read(one, 3)
    list(model.stream(SHORT, max_tokens=2, **HOW))


def logits(model) -> None:
    model.forward([LONG, LONG])
    model.score(SHORT)


def stepped(model, requests: list[tuple[list[int], dict[str, Any]]], at: dict[int, int] | None = None) -> None:
    """Steps an engine by hand, with one step after each request comes. at: index of a request -> index of the request
    to abort after its step."""
    limits = Limits(40, max_batch=16, batch_invariant=True) if model.deterministic else Limits(40, max_batch=16)
    with Engine(model._runner, limits) as engine:
        added = []
        for count, (prompt, how) in enumerate(requests):
            group = model._requests([prompt], qwenkern.SamplingParams(**HOW | how))
            engine.add(group[0])
            added.append(group[0])
            engine.step()
            if count in (at or {}):
                engine.abort(added[at[count]])
        while engine.has_requests:
            engine.step()


def forks(model) -> None:
    how = {"n": 2, "max_tokens": 3, "seed": 1, "temperature": 1.0, "logprobs": 1}
    stepped(model, [(LONG, how), (SHORT, how), (LONG[:63], how)])


def preempts(model) -> None:
    stepped(model, [(LONG[start:62], {"max_tokens": 5}) for start in range(4)])


def finds(model) -> None:
    """Prompts with cached beginnings, and one that needs the pages of cached texts."""
    stepped(model, [([*LONG, end], {"max_tokens": 2}) for end in range(3)])
    stepped(model, [(LONG + LONG[:35], {"max_tokens": 2}), (LONG[::-1], {"max_tokens": 30})])


def comes_and_goes(model) -> None:
    """Aborts two requests: a running one, and one that waits for free pages."""
    stepped(model, [(prompt, {"max_tokens": 4}) for prompt in (LONG, SHORT, LONG[1:], LONG[2:])], {1: 0, 3: 3})


def captures(model) -> None:
    model._runner.captured._steps.clear()
    stepped(model, [(SHORT, {"max_tokens": 3}), (LONG, {"max_tokens": 3})])
    stepped(model, [(SHORT, {"max_tokens": 3, "temperature": 1.0, "seed": 1})])


class Gpu(Fake):
    """A real GPU runs no Python code in a replay, so no exception is raised there."""

    def run_until(self, done: Callable[[], Any]) -> None:
        tracer = sys.gettrace()
        sys.settrace(None)
        try:
            super().run_until(done)
        finally:
            sys.settrace(tracer)


SCENARIOS: dict[str, tuple[Callable[[Any], None], dict[str, Any]]] = {
    "lists": (lists, {}),
    "streams": (streams, {}),
    "logits": (logits, {}),
    "stepped, forks": (forks, {}),
    "stepped, preempts": (preempts, {}),
    "stepped, finds": (finds, {}),
    "stepped, comes and goes": (comes_and_goes, {}),
    "stepped, forks, deterministic": (forks, {"deterministic": True}),
    "stepped, preempts, pipelined": (preempts, {"device": Gpu}),
    "stepped, captures, pipelined": (captures, {"device": Gpu}),
    "stepped, comes and goes, pipelined": (comes_and_goes, {"device": Gpu}),
}


@functools.cache
def leaves_a_with(code: CodeType) -> frozenset[int]:
    """Offsets between the body of a with statement and the call of its __exit__. An exception there would skip
    __exit__. None comes there, because the interpreter checks for signals only after calls and backward jumps."""
    found, steps = set(), list(dis.get_instructions(code))
    for at in range(len(steps) - 3):
        if [(step.opname, step.argval) for step in steps[at : at + 3]] == [("LOAD_CONST", None)] * 3:
            begin = at - 1 if steps[at - 1].opname in ("SWAP", "NOP") else at
            found |= {step.offset for step in steps[begin : at + 5]}  # up to CALL
    return frozenset(found)


def is_in_a_finalizer(frame: FrameType | None) -> bool:
    while frame and frame.f_code.co_filename in FILES:
        if frame.f_code.co_name in FINALIZERS:
            return True
        frame = frame.f_back
    return False


class Tracer:
    """Calls ``arrive`` with (code, offset) before each line, or bytecode, of FILES that this thread runs."""

    def __init__(self, arrive: Callable[[tuple[CodeType, int]], None], bytecodes: bool) -> None:
        self._arrive, self._bytecodes = arrive, bytecodes

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "call":
            if frame.f_code.co_filename not in FILES or is_in_a_finalizer(frame):
                return None
            frame.f_trace_opcodes, frame.f_trace_lines = self._bytecodes, not self._bytecodes
        elif event in ("line", "opcode") and frame.f_lasti not in leaves_a_with(frame.f_code):
            self._arrive((frame.f_code, frame.f_lasti))
        return self

    def run(self, work: Callable[[], None]) -> None:
        before = sys.gettrace()
        sys.settrace(self)
        try:
            work()
        finally:
            sys.settrace(before)


def places(model, scenario: Callable[[Any], None], bytecodes: bool) -> Iterator[tuple[tuple[CodeType, int], int]]:
    """Each place with the number of a visit: its first and its last one."""
    visits: Counter[tuple[CodeType, int]] = Counter()
    model.cache.forget()  # so that every run computes the same tokens
    Tracer(lambda place: visits.update([place]), bytecodes).run(lambda: scenario(model))
    for place, count in visits.items():
        yield from ((place, visit) for visit in sorted({1, count}))


def interrupted(
    model, scenario: Callable[[Any], None], place: tuple[CodeType, int], visit: int, bytecodes: bool
) -> bool:
    left = visit

    def arrive(at: tuple[CodeType, int]) -> None:
        nonlocal left
        if at == place:
            left -= 1
            if not left:
                raise KeyboardInterrupt

    model.cache.forget()
    try:
        Tracer(arrive, bytecodes).run(lambda: scenario(model))
    except KeyboardInterrupt:
        return True
    return False


def check(model, expected: list[int]) -> None:
    assert not model._loop._sinks, "a request goes on although nobody waits for it"
    assert model.generate(LONG, max_tokens=6, **HOW).token_ids == expected, "another text"
    check_pages(model)


@pytest.mark.parametrize("bytecodes", [False, True], ids=["lines", "bytecodes"])
@pytest.mark.parametrize("name", SCENARIOS)
def test_an_interrupt_anywhere_loses_nothing(name, bytecodes, monkeypatch):
    load = CapturedStep.load

    def in_order(step, batch):  # a GPU runs torch's own operations in order with launched steps
        if isinstance(step._capture, Fake):
            step._capture.run_until(lambda: False)
        load(step, batch)

    monkeypatch.setattr(CapturedStep, "load", in_order)
    scenario, keywords = SCENARIOS[name][0], dict(SCENARIOS[name][1])
    capture = keywords.pop("device", NotCaptured)()
    model = clockwork(capture, cache_tokens=192, **keywords)
    expected = model.generate(LONG, max_tokens=6, **HOW).token_ids
    scenario(model)  # creates the objects that are made only once
    todo = list(places(model, scenario, bytecodes))
    check(model, expected)
    if MOST and len(todo) > MOST:
        todo = random.Random(name).sample(todo, MOST)
    struck = 0
    for place, visit in todo:
        struck += interrupted(model, scenario, place, visit, bytecodes)
        try:
            check(model, expected)
        except AssertionError as error:
            code, offset = place
            line = next(line for start, end, line in code.co_lines() if start <= offset < end)
            raise AssertionError(f"{code.co_qualname}, line {line}, offset {offset}, visit {visit}: {error}") from None
    assert struck > 0.9 * len(todo), "the scenario does not pass the same places again, so this shows little"
