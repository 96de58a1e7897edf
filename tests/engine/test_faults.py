"""Forward passes that fail: their requests end with the reason, others go on, and nobody waits for ever."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from engine.test_decode import Fake, NotCaptured
from engine.test_interrupts import Gpu
from support.clockwork import clockwork, tokens_of
from support.engines import PATIENCE, Gate, check_pages, eventually

from qwenkern import SamplingParams
from qwenkern.engine import Engine, Limits
from qwenkern.engine import engine as engine_module
from qwenkern.engine.captured_step import CapturedStep
from qwenkern.engine.engine import MOST_FAULTS
from qwenkern.errors import EngineError

KINDS = [RuntimeError("no kernel"), torch.OutOfMemoryError("no memory"), AssertionError("a bug")]
HOW = {"max_tokens": 6, "ignore_eos": True, "temperature": 0}


@pytest.fixture(params=[NotCaptured, Gpu], ids=["one by one", "pipelined"])
def model(request, monkeypatch):
    load = CapturedStep.load

    def in_order(step, batch):  # a GPU runs torch's own operations in order with launched steps
        if isinstance(step._capture, Fake):
            step._capture.run_until(lambda: False)
        load(step, batch)

    monkeypatch.setattr(CapturedStep, "load", in_order)
    return clockwork(request.param(), cache_tokens=512)


def request_of(model, length: int, start: int = 1, **how: Any):
    prompt = [(start + 5 * at) % 64 for at in range(length)]
    return model._requests([prompt], SamplingParams(**HOW | how))[0]


def engine_of(model, **limits: Any) -> Engine:
    return Engine(model._runner, Limits(**{"prefill_chunk": 40} | limits))


def finish(engine: Engine) -> list:
    outputs = []
    while engine.has_requests:
        outputs += engine.step()
    return outputs


class Failing:
    """Makes the next ``count`` forward passes of a model fail. late: after they have written to the pages."""

    def __init__(self, model, error: Exception, count: int = 1, late: bool = False) -> None:
        self.left, self._error, self._late = count, error, late
        self._model, self._forward = model, model.module.forward

    def __enter__(self) -> Failing:
        self._model.module.forward = self._model.module.model.forward = self._fail
        return self

    def _fail(self, *args):
        if self.left <= 0 or getattr(self._model._runner.captured.capture, "running", False):
            return self._forward(*args)
        if self._late:
            self._forward(*args)
        self.left -= 1
        raise self._error

    def __exit__(self, *_: object) -> None:
        self._model.module.forward = self._model.module.model.forward = self._forward


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("error", KINDS, ids=lambda error: type(error).__name__)
def test_a_failed_pass_ends_what_was_in_it_alone(model, error, late):
    with engine_of(model) as engine:
        decoding = [request_of(model, 20, start) for start in range(2)]
        engine.add(*decoding)
        while not all(request.output_ids for request in decoding):
            engine.step()
        engine.step()
        reading = request_of(model, 70)
        engine.add(reading)
        with Failing(model, error, late=late) as failing:
            outputs = []
            while failing.left:
                outputs = engine.step()
        [output] = outputs
        assert (output.request, output.token_ids, output.finish_reason) == (reading, [], None)
        assert isinstance(output.error, EngineError)
        assert str(output.error) == f"the forward pass of this request failed: {type(error).__name__}: {error}"
        assert output.error.__cause__ is error
        engine.add(after := request_of(model, 70))
        finish(engine)
        assert engine.fault is None
    for request in (*decoding, after):
        assert request.output_ids == tokens_of(request)
    assert model.cache.num_free_pages == model.cache.num_pages


@pytest.mark.parametrize("model", [Gpu], ids=["pipelined"], indirect=True)  # others run a pass at once
def test_what_a_failed_pass_left_in_the_pages_is_not_found(model):
    """The captured step of the 64th token fails after its launch. The host knows the 64 tokens, but their page may have
    wrong contents."""
    capture, request = model._runner.captured.capture, request_of(model, 60, max_tokens=12)
    download = capture.download

    def may_fail(source):
        read = download(source)

        def fails():
            if len(request.output_ids) < 4:
                return read()
            capture._queue.clear()
            raise RuntimeError("injected")

        return fails

    capture.download = may_fail
    with engine_of(model) as engine:
        engine.add(request)
        finish(engine)
        assert len(request.output_ids) == 4
        assert isinstance(request.error, EngineError)
        del capture.download
        turn = model._requests([request.prompt_ids + request.output_ids + [1, 2]], SamplingParams(**HOW))[0]
        engine.add(turn)
        finish(engine)
    assert turn.num_found == 0
    assert turn.output_ids == tokens_of(turn)


def test_a_prompt_of_several_completions_ends_with_all_of_them(model):
    group = model._requests([[5] * 50], SamplingParams(n=3, **HOW))
    with engine_of(model) as engine, Failing(model, KINDS[0]):
        engine.add(group[0])
        outputs = engine.step()
        assert {output.request for output in outputs} == set(group)
        assert all(isinstance(output.error, EngineError) for output in outputs)
        assert len({id(output.error) for output in outputs}) == 3, "each caller raises one of its own"
        assert not engine.has_requests


def test_a_fault_of_the_sampling_ends_those_that_have_just_forked(model, monkeypatch):
    group = model._requests([[5] * 50], SamplingParams(n=3, **HOW | {"temperature": 1.0, "logprobs": 0}))
    with engine_of(model, max_batch=2) as engine, monkeypatch.context() as patch:
        engine.add(group[0])
        patch.setattr(engine_module, "sample", lambda *args: 1 / 0)
        outputs = [output for _ in range(2) for output in engine.step()]
        assert [output.request for output in outputs] == group[:2]
        patch.undo()
        finish(engine)
    assert group[2].finish_reason == "length", "it had not started"
    assert model.cache.num_free_pages == model.cache.num_pages


def test_three_faults_in_a_row_stop_the_engine(model):
    engine = engine_of(model)
    with Failing(model, RuntimeError("no kernel"), count=MOST_FAULTS):
        errors = []
        for start in range(MOST_FAULTS):
            engine.add(request_of(model, 20, start))
            if start == MOST_FAULTS - 1:
                engine.add(waiting := request_of(model, 500))
            errors += [output.error for output in engine.step()]
    assert [type(error) for error in errors] == [EngineError] * (MOST_FAULTS + 1)
    assert waiting.error is not None, "nobody waits for ever"
    assert str(errors[-1]) == (
        "the engine has stopped, load the model again: 3 forward passes failed in a row, the last one with "
        "RuntimeError: no kernel"
    )
    for _ in range(2):
        with pytest.raises(EngineError, match="the engine has stopped") as raised:
            engine.add(request_of(model, 3))
        assert len(raised.traceback) < 4, "the traceback does not grow from caller to caller"
    assert not engine.has_requests
    assert engine.step() == []
    assert model.cache.num_free_pages == model.cache.num_pages


def test_faults_that_come_now_and_then_do_not_stop_it(model):
    with engine_of(model) as engine:
        for start in range(4 * MOST_FAULTS):
            if start % MOST_FAULTS:
                with Failing(model, RuntimeError("no kernel")):
                    engine.add(request_of(model, 20, start))
                    finish(engine)
            else:
                engine.add(fine := request_of(model, 20, start))
                finish(engine)
                assert fine.output_ids == tokens_of(fine)
        assert engine.fault is None


@pytest.mark.parametrize(
    "error",
    [RuntimeError("CUDA error: an illegal memory access was encountered"), "AcceleratorError"],
    ids=["CUDA error", "AcceleratorError"],
)
def test_a_lost_device_stops_it_at_once(model, error, monkeypatch):
    if isinstance(error, str):

        class AcceleratorError(RuntimeError):
            pass

        monkeypatch.setattr(torch, "AcceleratorError", AcceleratorError, raising=False)
        error = AcceleratorError("the device is gone")
    with engine_of(model) as engine, Failing(model, error):
        engine.add(first := request_of(model, 20), second := request_of(model, 500))
        outputs = engine.step()
        assert {output.request for output in outputs} == {first, second}
        assert all("the engine has stopped, load the model again" in str(output.error) for output in outputs)
        with pytest.raises(EngineError, match=str(error)):
            engine.add(request_of(model, 3))


def test_a_fault_of_the_scheduler_stops_it(model, monkeypatch):
    """No single request is the cause, and the fault would come again."""
    engine = engine_of(model)
    engine.add(request_of(model, 20), request_of(model, 30))
    monkeypatch.setattr(engine.scheduler, "_admit", lambda: 1 / 0)
    assert len(engine.step()) == 2
    assert "ZeroDivisionError" in str(engine.fault)


def test_the_tensors_of_a_failed_pass_are_freed(model):
    """The error outlives the pass, and its traceback refers to the frames of the pass."""
    seen = []

    class Activation:
        pass

    def fail(*args):
        activation = Activation()
        seen.append(weakref.ref(activation))
        raise torch.OutOfMemoryError("no memory")

    with engine_of(model) as engine:
        model.module.forward, forward = fail, model.module.forward
        engine.add(request := request_of(model, 20))
        engine.step()
        model.module.forward = forward
    assert request.error.__cause__.__traceback__ is not None
    gc.collect()
    assert seen
    assert seen[0]() is None


# The model's own engine, in its thread


def test_callers_get_the_reason_and_others_their_text(model):
    right = model._requests([[3] * 30], SamplingParams(**HOW | {"max_tokens": 30}))[0]
    with Gate(model) as gate:
        stream = model.stream(right.prompt_ids, **HOW | {"max_tokens": 30})
        gate.steps(4)
        found: list[BaseException] = []

        def caller() -> None:
            try:
                model.generate([[4] * 60, [5] * 70], **HOW)
            except BaseException as error:
                found.append(error)

        thread = threading.Thread(target=caller, daemon=True)
        thread.start()
        eventually(lambda: len(model._loop._sinks) == 3)
        with Failing(model, torch.OutOfMemoryError("no memory")) as failing:
            while failing.left:
                gate.steps(1)
        thread.join(PATIENCE)
        assert not thread.is_alive()
    [error] = found
    assert isinstance(error, EngineError)
    assert "OutOfMemoryError: no memory" in str(error)
    list(stream)
    assert stream.completion.token_ids == tokens_of(right)
    assert model.generate(right.prompt_ids, **HOW).token_ids == tokens_of(right)[:6]
    check_pages(model)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no memory"), RuntimeError("CUDA error: gone"), SystemExit(3)]
)
def test_no_caller_waits_for_ever(model, error):
    """With any error: 20 threads with calls of each kind."""
    model.generate([1, 2, 3], **HOW)

    def fail(*args):
        raise error

    model.module.forward = model.module.model.forward = fail
    calls = [
        lambda: model.generate([[3] * 30, [4] * 300], n=2, **HOW),
        lambda: list(model.stream([4] * 30, **HOW)),
        lambda: model.score([5] * 100),
        lambda: model.forward([6] * 100),
    ]
    found: list[BaseException] = []

    def caller(index: int) -> None:
        try:
            calls[index % len(calls)]()
        except BaseException as error:
            found.append(error)

    threads = [threading.Thread(target=caller, args=(index,), daemon=True) for index in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads), "a caller waits for ever"
    assert len(found) == 20
    assert all(isinstance(each, EngineError) and str(error) in str(each) for each in found)
    with pytest.raises(EngineError, match="the engine has stopped, load the model again"):
        model.generate([1], **HOW)
    check_pages(model)
