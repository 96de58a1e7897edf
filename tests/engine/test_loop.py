"""The thread that steps a model's engine, and what may interrupt its callers: threads, coroutines, signals, and the
garbage collector."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref
from typing import Any

import pytest
from engine.test_decode import NotCaptured
from support.clockwork import clockwork, tokens_of
from support.engines import PATIENCE, Gate, all_free, check_pages, eventually, read
from support.models import TINY
from support.toy_tokenizer import byte_tokenizer

from qwenkern import RequestError, SamplingParams
from qwenkern.engine import AsyncCall, Output
from qwenkern.engine import loop as loop_module
from qwenkern.errors import EngineError

HOW = {"max_tokens": 8, "ignore_eos": True, "temperature": 0}
PROMPTS = [[(start + 5 * at) % 64 for at in range(10 + 20 * start)] for start in range(6)]


@pytest.fixture
def model():
    return make()


def make(**keywords: Any):
    return clockwork(NotCaptured(), **{"cache_tokens": 1024} | keywords)


def expected(model, prompt, **how: Any) -> list[int]:
    return tokens_of(model._requests([prompt], SamplingParams(**HOW | how))[0])


def in_thread(work) -> tuple[threading.Thread, list]:
    """A thread, and a list that gets the result or the exception of its work."""
    found: list = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, found


def join(thread: threading.Thread) -> None:
    thread.join(PATIENCE)
    assert not thread.is_alive(), "it waits for ever"


# Closing


def test_a_closed_model_ends_the_calls_of_other_threads(model):
    with Gate(model) as gate:
        works = [
            lambda: model.generate([PROMPTS[0], PROMPTS[1]], n=2, **HOW),
            lambda: list(model.stream(PROMPTS[2], **HOW)),
            lambda: model.score(PROMPTS[3]),
            lambda: asyncio.run(model.agenerate(PROMPTS[4], **HOW)),
        ]
        calls = [in_thread(work) for work in works]
        eventually(lambda: len(model._loop._sinks) == 7)
        gate.steps(3)
        closing, _ = in_thread(model.close)
        eventually(model._loop._stop.is_set)
        gate.steps(1)  # the step in progress
        join(closing)
        for thread, found in calls:
            join(thread)
            assert isinstance(found[0], EngineError)
            assert str(found[0]) == "this model was closed before the request had ended"
    assert not any(thread.is_alive() for thread in model._loop._threads)
    check_pages(model)
    for work in works:
        with pytest.raises(EngineError, match="this model is closed; load it again"):
            work()
    model.close()
    assert all_free(model)


def test_the_end_of_a_with_statement_closes_a_model():
    with make() as model:
        assert model.generate(PROMPTS[0], **HOW).token_ids == expected(model, PROMPTS[0])
        stream = model.stream(PROMPTS[1], **HOW)
        read(stream, 8)
    assert stream.completion.token_ids == expected(model, PROMPTS[1])
    with pytest.raises(EngineError, match="closed"):
        model.generate(PROMPTS[0], **HOW)
    with make():
        pass


def test_a_pass_that_takes_long_keeps_nobody_waiting(model, monkeypatch):
    """Callers get an error after PATIENCE seconds. The pass still uses the engine, and ends by itself."""
    monkeypatch.setattr(loop_module, "PATIENCE", 0.02)
    with Gate(model) as gate:
        call, found = in_thread(lambda: model.generate(PROMPTS[0], **HOW))
        eventually(gate.has_come.is_set)
        model.close()
        join(call)
        assert "closed before the request had ended" in str(found[0])
        [thread] = model._loop._threads
        assert thread.is_alive()
    join(thread)


def test_a_request_that_is_refused_leaves_nothing(model):
    with pytest.raises(RequestError, match="context length"):
        model.generate([PROMPTS[0], [1] * 600], **HOW)
    requests = model._requests([PROMPTS[0], PROMPTS[1]], SamplingParams(n=2, **HOW))
    requests[2].max_tokens = 5000
    with pytest.raises(RequestError, match="key-value cache has room"):
        loop_module.Call(model._loop, [requests[0], requests[2]])
    assert not model._loop._sinks
    assert not model._loop.engine.has_requests, "the first one was not added either"


def test_the_prompts_of_a_call_are_read_together(model):
    """Otherwise the bits of their results would depend on when the thread wakes."""
    sizes, logits = [], type(model._runner).logits
    model._runner.logits = lambda parts, *args: (sizes.append(len(parts)), logits(model._runner, parts, *args))[1]
    for _ in range(20):
        sizes.clear()
        model.generate([[1, 2, 3], [4, 5, 6, 7], [8, 9]], max_tokens=2, ignore_eos=True, temperature=0)
        assert sizes == [3, 3]


def test_an_idle_engine_takes_no_steps(model):
    model.generate(PROMPTS[0], **HOW)
    steps, step = [], model._loop.engine.step
    model._loop.engine.step = lambda: (steps.append(1), step())[1]
    time.sleep(0.05)
    assert steps == []
    model.generate(PROMPTS[0], **HOW)
    count = len(steps)
    assert 8 <= count <= 12
    time.sleep(0.05)
    assert len(steps) == count


# The garbage collector, and the end of the interpreter


def test_a_model_that_nobody_refers_to_ends_its_thread():
    model = make()
    model.generate(PROMPTS[0], **HOW)
    [thread], alive = model._loop._threads, weakref.ref(model._loop)
    del model

    def is_gone() -> bool:  # soon: the thread may not have ended its last step
        gc.collect()
        return alive() is None

    eventually(is_gone)
    join(thread)


def test_what_has_ended_is_freed(model, monkeypatch):
    """After 300 calls, no more requests and calls are in memory than after 30."""
    alive: weakref.WeakSet = weakref.WeakSet()
    init = loop_module._Call.__init__

    def noted(call, loop, requests, sink):
        alive.add(call)
        alive.update(loop_module.with_siblings(requests))
        init(call, loop, requests, sink)

    def some(count: int) -> int:
        for at in range(count):
            if at % 3 == 0:
                model.generate([[at % 64] * 70, [at % 7] * 20], n=2, **HOW)
            elif at % 3 == 1:
                with model.stream([at % 64] * 70, **HOW) as stream:
                    read(stream, 2)
            else:
                asyncio.run(model.agenerate([at % 64] * 70, **HOW))
        check_pages(model)
        gc.collect()
        return len(alive)

    monkeypatch.setattr(loop_module._Call, "__init__", noted)
    assert some(30) <= 4, "those of the last pass"
    assert some(300) <= 4
    assert len(model.cache._index) <= model.cache.num_pages


def test_a_stream_keeps_the_engine_of_its_model():
    model = make()
    right = expected(model, PROMPTS[1], max_tokens=200)
    stream, alive = model.stream(PROMPTS[1], **HOW | {"max_tokens": 200}), weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    list(stream)
    assert stream.completion.token_ids == right


def test_the_collector_may_end_a_call_at_any_line_of_another_one(model):
    """In the same thread, also while it wakes the engine's thread. It must not wait for a lock that it holds itself."""
    files = loop_module.__file__, threading.__file__
    with Gate(model) as gate:
        forgotten = [model.stream(PROMPTS[0], **HOW | {"max_tokens": 400}) for _ in range(60)]

        def drop(frame, event: str, _: Any):
            if frame.f_code.co_filename not in files:
                return None
            if event == "line" and forgotten:
                sys.settrace(None)
                del forgotten[-1]
                sys.settrace(drop)
            return drop

        def work() -> None:
            sys.settrace(drop)
            kept.append(model.stream(PROMPTS[1], **HOW))
            sys.settrace(None)

        kept: list = []
        thread, found = in_thread(work)
        join(thread)
        assert found == [None]
        assert 0 < len(forgotten) < 55
        forgotten.clear()
        gate.steps(2)
    list(kept[0])
    assert kept[0].completion.token_ids == expected(model, PROMPTS[1])
    check_pages(model)


EXIT = """
import gc, sys
sys.path[:0] = {path!r}
from support.models import tiny_model
model = tiny_model()
stream = model.stream([1, 2, 3], max_tokens=500, ignore_eos=True)
next(stream._call)
{how}
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["raise KeyError('mine')", "stream.itself = stream; del stream, model"])
def test_a_program_may_end_while_a_stream_is_open(how):
    code = EXIT.format(path=[entry for entry in sys.path if entry.endswith("tests")], how=how)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == (1 if how.startswith("raise") else 0)
    assert done.stderr.count("Traceback") == ("raise" in how), done.stderr


# Signals


@pytest.mark.parametrize("work", ["generate", "stream", "score", "asyncio"])
def test_ctrl_c_ends_a_call_that_waits(model, work):
    """The step in progress hangs. The main thread is interrupted at once, and the pages become free after the step."""
    works = {
        "generate": lambda: model.generate([PROMPTS[0], PROMPTS[1]], n=2, **HOW),
        "stream": lambda: list(model.stream(PROMPTS[0], **HOW)),
        "score": lambda: model.score(PROMPTS[0]),
        "asyncio": lambda: asyncio.run(model.agenerate(PROMPTS[0], **HOW)),
    }
    assert threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with Gate(model) as gate:
            gone = threading.Event()

            def press() -> None:
                eventually(lambda: model._loop._sinks)
                while not gone.wait(0.02):  # repeated, because a signal may come before the caller waits
                    os.kill(os.getpid(), signal.SIGINT)
                    gone.wait(5.0)  # a second signal while the first one is handled would end the tests

            presser = threading.Thread(target=press, daemon=True)
            presser.start()
            try:
                with pytest.raises(KeyboardInterrupt):
                    works[work]()
            finally:
                gone.set()
                presser.join(PATIENCE)
            gate.steps(1)
            eventually(lambda: all_free(model))
    finally:
        signal.signal(signal.SIGINT, handler)
    assert model.generate(PROMPTS[2], **HOW).token_ids == expected(model, PROMPTS[2])


# Coroutines


def test_coroutines_get_what_threads_get(model):
    async def many():
        calls = [model.agenerate(prompt, **HOW) for prompt in PROMPTS * 5]
        calls.append(model.agenerate(PROMPTS[:2], n=2, **HOW))
        return await asyncio.gather(*calls)

    *single, listed = asyncio.run(many())
    right = [expected(model, prompt) for prompt in PROMPTS]
    assert [completion.token_ids for completion in single] == right * 5
    assert [completion.token_ids for completion in listed] == [right[0], right[0], right[1], right[1]]
    assert [(each.prompt_index, each.sample_index) for each in listed] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    check_pages(model)


def test_a_stream_of_a_coroutine_yields_the_text():
    model = make(vocab_size=TINY.vocab_size)
    model.tokenizer = byte_tokenizer(TINY.vocab_size)
    prompt = list(range(65, 90))
    right = model.generate(prompt, **HOW | {"max_tokens": 40})

    async def reads():
        stream = model.astream(prompt, **HOW | {"max_tokens": 40})
        pieces = [piece async for piece in stream]
        return pieces, stream.completion

    pieces, completion = asyncio.run(reads())
    assert "".join(pieces) == right.text
    assert len(pieces) > 5
    assert all(pieces)
    assert (completion.token_ids, completion.finish_reason) == (right.token_ids, "length")


def test_an_event_loop_goes_on_while_a_coroutine_waits(model):
    async def ticks() -> int:
        task, count = asyncio.ensure_future(model.agenerate(PROMPTS[0], **HOW)), 0
        while not model._loop._sinks:
            await asyncio.sleep(0)
        for _ in range(20):
            await asyncio.sleep(0)
            count += not task.done()
        release.set()
        await task
        return count

    with Gate(model) as gate:
        release = threading.Event()
        opener, _ = in_thread(lambda: (release.wait(PATIENCE), gate.open()))
        assert asyncio.run(ticks()) == 20
        join(opener)


@pytest.mark.parametrize("work", ["agenerate", "astream"])
@pytest.mark.parametrize("how", ["cancel", "timeout"])
def test_a_cancelled_task_ends_its_requests(model, work, how):
    async def reads():
        async for _ in model.astream(PROMPTS[0], **HOW | {"max_tokens": 400}):
            pass

    async def run():
        call = reads() if work == "astream" else model.agenerate([PROMPTS[0], PROMPTS[1]], **HOW | {"max_tokens": 400})
        other = asyncio.ensure_future(model.agenerate(PROMPTS[2], **HOW))
        if how == "timeout":
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(call, 0.02)
        else:
            task = asyncio.ensure_future(call)
            while not model._loop._sinks:
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert len(model._loop._sinks) <= 1
        release.set()
        return (await other).token_ids

    with Gate(model) as gate:
        release = threading.Event()
        opener, _ = in_thread(lambda: (release.wait(PATIENCE), gate.open()))
        assert asyncio.run(run()) == expected(model, PROMPTS[2])
        join(opener)
    check_pages(model)


def test_leaving_a_stream_in_the_middle_ends_it(model):
    async def fails():
        async with model.astream(PROMPTS[1], **HOW | {"max_tokens": 400}) as stream:
            await anext(stream._call)
            raise KeyError

    async def leaves():
        async with model.astream(PROMPTS[0], **HOW | {"max_tokens": 400}) as stream:
            await anext(stream._call)
        assert [piece async for piece in stream] == []
        with pytest.raises(KeyError):
            await fails()
        forgotten = model.astream(PROMPTS[1], **HOW | {"max_tokens": 400})
        await anext(forgotten._call)
        del forgotten
        while not all_free(model):
            await asyncio.sleep(0.001)

    asyncio.run(asyncio.wait_for(leaves(), PATIENCE))


def test_a_coroutine_takes_all_outputs_that_have_come(model):
    [request] = model._requests([PROMPTS[0]], SamplingParams(**HOW))

    async def takes():
        async with AsyncCall(model._loop, [request]) as call:
            eventually(lambda: request.has_ended)  # this blocks the event loop
            taken = []
            while outputs := await call.take():
                taken.append([token for output in outputs for token in output.token_ids])
            return taken

    taken = asyncio.run(takes())
    assert len(taken[0]) >= HOW["max_tokens"] - 1
    assert [token for each in taken for token in each] == expected(model, PROMPTS[0])


def test_an_error_comes_after_the_outputs_before_it_and_ends_the_call(model):
    requests = model._requests(PROMPTS[:2], SamplingParams(**HOW))

    async def takes():
        async with AsyncCall(model._loop, requests) as call:
            for output in (Output(requests[0], [1], "a"), Output(requests[0], [], "", error=EngineError("why"))):
                call._inbox.put(output)
            assert [output.text for output in await call.take()] == ["a"]
            with pytest.raises(EngineError, match="why"):
                await call.take()
            assert requests[1].aborted
            assert await call.take() == []

    with Gate(model):
        asyncio.run(takes())
    eventually(lambda: all_free(model))


def test_two_coroutines_cannot_read_one_call(model):
    async def reads():
        async with AsyncCall(model._loop, model._requests([PROMPTS[0]], SamplingParams(**HOW))) as call:
            first = asyncio.ensure_future(call.take())
            await asyncio.sleep(0)
            with pytest.raises(RequestError, match="another coroutine is reading this; expected one reader at a time"):
                await call.take()
            gate.open()
            return [output.token_ids for output in await first]

    with Gate(model) as gate:
        assert asyncio.run(reads())[0] == expected(model, PROMPTS[0])[:1]
    eventually(lambda: all_free(model))


def test_a_closed_event_loop_ends_its_requests_and_no_others(model):
    with Gate(model) as gate:
        events = asyncio.new_event_loop()

        async def begin():
            return [model.astream(prompt, **HOW | {"max_tokens": 400}) for prompt in PROMPTS[:2]]

        streams = events.run_until_complete(begin())
        thread, found = in_thread(lambda: model.generate(PROMPTS[2], **HOW).token_ids)
        eventually(lambda: len(model._loop._sinks) == 3)
        events.close()
        gate.open()
        join(thread)
        assert found == [expected(model, PROMPTS[2])]
        eventually(lambda: all_free(model))
        assert streams


def test_a_closed_event_loop_does_not_keep_the_reason_from_others(model):
    """The engine stops while its first callers belong to a closed event loop."""
    with Gate(model):
        events = asyncio.new_event_loop()

        async def begin():
            return [model.astream(prompt, **HOW) for prompt in PROMPTS[:3]]

        streams = events.run_until_complete(begin())
        events.close()
        thread, found = in_thread(lambda: model.generate(PROMPTS[2], **HOW))
        eventually(lambda: len(model._loop._sinks) == 4)
        model._loop._end_all(EngineError("it is over"))
        join(thread)
        assert str(found[0]) == "it is over"
        assert streams


def test_several_event_loops_share_a_model(model):
    async def several():
        return [each.token_ids for each in await asyncio.gather(*[model.agenerate(p, **HOW) for p in PROMPTS])]

    calls = [in_thread(lambda: asyncio.run(several())) for _ in range(4)]
    for thread, found in calls:
        join(thread)
        assert found == [[expected(model, prompt) for prompt in PROMPTS]]
    check_pages(model)


def test_a_coroutines_stream_needs_an_event_loop(model):
    gc.collect()  # what other tests have left may warn
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with pytest.raises(RuntimeError, match="no running event loop"):
            model.astream(PROMPTS[0], **HOW)
        gc.collect()
    assert not told
    assert not model._loop.engine.has_requests


def test_a_coroutine_gets_the_error(model):
    def fail(*args):
        raise ValueError("theirs")

    model.module.forward = fail

    async def both():
        with pytest.raises(EngineError, match="ValueError: theirs"):
            await model.agenerate(PROMPTS[0], **HOW)
        with pytest.raises(EngineError, match="ValueError: theirs"):
            async for _ in model.astream(PROMPTS[0], **HOW):
                pass
        with pytest.raises(RequestError, match="n is 2"):
            model.astream(PROMPTS[0], n=2, **HOW)

    asyncio.run(both())
    check_pages(model)


def test_the_outputs_of_a_step_wake_an_event_loop_once(model, monkeypatch):
    """The event loop is busy. All outputs wait for it in one callback."""
    woken = []

    async def both() -> list[str]:
        loop = asyncio.get_running_loop()
        call_soon = loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *work: (woken.append(work), call_soon(*work)))
        streams = [model.astream([1, 2, n], max_tokens=20, ignore_eos=True) for n in range(8)]
        eventually(lambda: not model._loop._sinks)  # meanwhile, the event loop gets no outputs
        texts = []
        for stream in streams:
            pieces = [piece async for piece in stream]
            texts.append("".join(pieces))
        return texts

    texts = asyncio.run(both())
    assert texts == [model.generate([1, 2, n], max_tokens=20, ignore_eos=True).text for n in range(8)]
    assert len(woken) < 20
