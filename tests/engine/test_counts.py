"""The counts of an engine agree with what its callers saw."""

from __future__ import annotations

import threading

import pytest
from support.engines import Gate, check_pages, eventually, read
from support.models import tiny_model

from qwenkern import EngineError, SamplingParams
from qwenkern.engine import Request
from qwenkern.engine.counts import Counts, Histogram

PROMPT = [7 * n % 503 for n in range(150)]
HOW = {"max_tokens": 5, "ignore_eos": True}


@pytest.fixture
def model():
    model = tiny_model(cache_tokens=512)
    yield model
    model.close()


def counts_of(model) -> Counts:
    return model._loop.engine.counts


def test_tokens_and_outcomes_are_those_of_the_completions(model):
    found = model.generate([PROMPT, PROMPT[:20]], n=3, temperature=1.0, seed=2, **HOW)
    ended = model.generate(
        PROMPT[:9], max_tokens=3, stop_token_ids=[model.generate(PROMPT[:9], max_tokens=1).token_ids[0]]
    )
    counts = counts_of(model)
    assert ended.finish_reason == "stop"
    assert counts.generated == sum(each.num_tokens for each in found) + 1 + 1
    assert counts.prompt_tokens == 150 + 20 + 9 + 9, "a prompt counts once for all of its completions"
    assert counts.outcomes == {"stop": 1, "length": 7, "abort": 0, "error": 0}
    assert sum(counts.first_token.counts) == sum(counts.whole.counts) == 8
    assert sum(counts.between_tokens.counts) == counts.generated - 8
    assert sum(counts.queued.counts) == 4, "one for each prompt"
    assert 0 < counts.first_token.sum < counts.whole.sum


def test_what_the_cache_still_had_counts_as_found(model):
    model.generate(PROMPT, **HOW)
    again = model.generate(PROMPT, **HOW)
    counts = counts_of(model)
    assert again.num_cached_tokens == 128
    assert (counts.looked_up, counts.found) == (300, 128)


def test_nothing_is_looked_up_without_a_prefix_cache():
    with tiny_model(prefix_cache=False) as model:
        model.generate(PROMPT, **HOW)
        assert (counts_of(model).looked_up, counts_of(model).found) == (0, 0)
        assert counts_of(model).prompt_tokens == 150


def test_a_preempted_request_counts_once(model):
    prompts = [PROMPT, PROMPT[50:], PROMPT[20:140]]
    model.generate(prompts, max_tokens=150, ignore_eos=True)
    counts = counts_of(model)
    assert counts.preempted > 0, "this shows nothing"
    assert counts.prompt_tokens == sum(map(len, prompts))
    assert counts.generated == 450
    assert counts.outcomes["length"] == 3


def test_an_abort_counts_whether_or_not_the_request_has_started(model):
    with Gate(model) as gate:
        streams = [model.stream(PROMPT, **HOW), model.stream(PROMPT, **HOW)]
        gate.has_come.wait()
        streams[0].close()
        gate.steps(1)
        read(streams[1], 1)
        streams[1].close()
        gate.open()
        check_pages(model)
    eventually(lambda: counts_of(model).outcomes["abort"] == 2)
    assert sum(counts_of(model).outcomes.values()) == 2


def test_a_pass_that_fails_counts_its_requests(model, monkeypatch):
    def fail(*_args, **_keywords):
        raise MemoryError("no memory")

    monkeypatch.setattr(model._loop.engine.runner, "logits", fail)
    with pytest.raises(EngineError):
        model.generate([PROMPT, PROMPT], **HOW)
    eventually(lambda: counts_of(model).outcomes["error"] == 2)


def test_an_engine_is_busy_since_its_last_progress(model, monkeypatch):
    counts, release, has_come = counts_of(model), threading.Event(), threading.Event()
    assert counts.busy_since is None
    model.generate(PROMPT, **HOW)
    eventually(lambda: counts.busy_since is None)
    runner = model._loop.engine.runner
    logits = runner.logits

    def hang(*args, **keywords):
        has_come.set()
        release.wait()
        return logits(*args, **keywords)

    monkeypatch.setattr(runner, "logits", hang)
    stream = model.stream(PROMPT, **HOW)
    assert has_come.wait(60)
    since = counts.busy_since
    assert since is not None
    assert counts.busy_since == since, "a pass that hangs is no progress"
    release.set()
    list(stream)
    eventually(lambda: counts.busy_since is None)


def test_an_arrival_that_the_caller_knows_is_kept(model):
    request = Request([1, 2, 3], SamplingParams(), frozenset(), max_tokens=1)
    request.arrived = 5.0
    model._loop.engine.scheduler.add(request)
    assert request.arrived == 5.0


def test_a_histogram_counts_values_up_to_each_bound():
    histogram = Histogram([1.0, 2.0])
    for value in (0.5, 1.0, 1.5, 7.0):
        histogram.note(value)
    assert histogram.counts == [2, 1, 1]
    assert histogram.sum == 10.0


def test_the_sum_of_two_engines_has_all_numbers():
    with tiny_model() as model:
        model.generate(PROMPT, **HOW)
        model.generate(PROMPT, **HOW)
        counts, total = counts_of(model), Counts()
        total.add(counts)
        total.add(counts)
    assert total.generated == 2 * counts.generated == 20
    assert total.outcomes["length"] == 4
    assert total.first_token.counts == [2 * each for each in counts.first_token.counts]
    assert total.found == 2 * counts.found > 0
