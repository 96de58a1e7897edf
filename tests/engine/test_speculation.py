"""Drafts change only the time: the tokens, texts and log-probabilities are the same, to the last bit."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from engine.test_decode import IN_C, in_c
from support.models import TINY, tiny_model
from support.toy_tokenizer import byte_tokenizer

from qwenkern import RequestError, SamplingParams
from qwenkern.cache import PagedCache
from qwenkern.engine.drafts import LONGEST, PLACES, SHORTEST, Drafts
from qwenkern.engine.engine import Engine
from qwenkern.engine.speculation import READINGS, SIZES, Costs, Rates

pytestmark = pytest.mark.processor
__all__ = ["in_c"]  # a fixture

PROMPTS = [[3, 5, 7, 9, 11, 3, 5, 7], [n * 7 % 11 for n in range(70)], [4, 4, 4, 4], list(range(60, 125)) * 2]
HOWS = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 1.0, "seed": 4},
    "top k and p": {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 1},
    "penalties": {"temperature": 0.7, "repetition_penalty": 1.1, "frequency_penalty": 0.1, "seed": 2},
    "biases": {"temperature": 0, "logit_bias": {9: 1.5}, "min_tokens": 20},
    "stops": {"temperature": 0, "stop_token_ids": [17, 40, 9, 100, 200, 300], "max_tokens": 90},
}


@pytest.fixture
def make(in_c, monkeypatch):
    monkeypatch.setattr(Costs, "of", lambda costs, rows: 1.0)  # so that drafts have the maximal length
    return lambda **keywords: tiny_model(IN_C, torch.bfloat16, tokenizer=byte_tokenizer(TINY.vocab_size), **keywords)


def outcome(model, prompts, **how):
    keywords = {"max_tokens": 60, "ignore_eos": True, "logprobs": 2} | how
    done = model.generate(prompts, **keywords)
    return [(each.token_ids, each.text, each.logprobs, each.finish_reason) for each in done]


class Oracle:
    """Drafts from the expected texts, some with a wrong token."""

    def __init__(self) -> None:
        self.texts: list[list[int]] = []
        self._choose = random.Random(1)

    def draft(self, drafts, count):
        ids = drafts._ids
        for text in self._choose.sample(self.texts, len(self.texts)):
            if text[: len(ids)] == ids and len(text) > len(ids):
                draft = text[len(ids) :][:count]
                if self._choose.random() < 0.5:
                    draft[self._choose.randrange(len(draft))] = 1
                return draft, SHORTEST
        return [], 0


@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
def test_the_outcome_is_the_same_to_the_last_bit(make, how, monkeypatch):
    """For single requests, in batches, for completions of one prompt, and with few pages for drafts."""
    oracle = Oracle()
    monkeypatch.setattr(Drafts, "draft", lambda drafts, count: oracle.draft(drafts, count))
    plain, drafting = make(speculate=False, prefix_cache=False), make(prefix_cache=False)
    small = make(prefix_cache=False, cache_tokens=256)
    for prompts in ([PROMPTS[0]], [PROMPTS[1]], PROMPTS):
        expected = outcome(plain, prompts, **how)
        oracle.texts = [prompt + each[0] for prompt, each in zip(prompts, expected, strict=True)]
        assert outcome(drafting, prompts, **how) == expected
        if len(prompts) == 1:
            assert outcome(small, prompts, **how) == expected
    expected = outcome(plain, PROMPTS[:2], n=3, **how)
    oracle.texts = [PROMPTS[at // 3] + each[0] for at, each in enumerate(expected)]
    assert outcome(drafting, PROMPTS[:2], n=3, **how) == expected
    speculation = drafting._loop.engine.speculation
    assert speculation.num_accepted > 20
    assert speculation.num_drafted > speculation.num_accepted, "no draft was wrong, so this shows little"
    for model in (drafting, small):
        assert model.cache.num_free_pages == model.cache.num_pages


def test_a_pass_has_no_more_rows_than_are_batch_invariant(make, monkeypatch):
    model, rows = make(), []
    each_logits = type(model._loop.engine.runner).each_logits
    spy = lambda runner, parts: (rows.append(sum(len(ids) for _, ids in parts)), each_logits(runner, parts))[1]  # noqa: E731
    monkeypatch.setattr(type(model._loop.engine.runner), "each_logits", spy)
    outcome(model, [PROMPTS[2]] * 12, temperature=0)
    outcome(model, PROMPTS[2:3], temperature=0)
    assert rows
    assert set(rows) <= set(SIZES)
    assert max(rows) == model._loop.engine.speculation.most_rows == 16


def test_a_small_model_guesses(make, monkeypatch):
    """As a draft model, the same model guesses every token of a greedy text, and another one few. The outcome is the
    same."""
    monkeypatch.setattr(Drafts, "draft", lambda drafts, count: ([], 0))
    plain, same = make(speculate=False), make(draft=make())
    other = make(draft=tiny_model(IN_C, torch.bfloat16, seed=7, tokenizer=byte_tokenizer(TINY.vocab_size)))
    models = same, other
    for name in ("greedy", "penalties", "stops"):
        for prompts in (PROMPTS[1:2], PROMPTS):
            expected = outcome(plain, prompts, **HOWS[name])
            assert [outcome(model, prompts, **HOWS[name]) for model in models] == [expected] * 2
        if name == "greedy":
            counts = [model._loop.engine.speculation for model in models]
            assert counts[0].num_accepted > 0.9 * counts[0].num_drafted > 50, "all but those after an end"
            assert counts[1].num_accepted < 0.5 * counts[1].num_drafted
    for model in (same, other):
        reader = model._loop.engine.speculation._model
        reader.draft({})  # frees the pages of ended requests
        assert reader._runner.cache.num_free_pages == reader._runner.cache.num_pages


def test_a_small_model_without_room_does_not_guess(make, monkeypatch):
    monkeypatch.setattr(Drafts, "draft", lambda drafts, count: ([], 0))
    model = make(draft=make())
    small = model._loop.engine.speculation._model
    small._runner.cache = PagedCache(IN_C, 128, torch.bfloat16, torch.device("cpu"))
    small._runner.captured._cache = small._runner.cache
    assert outcome(model, PROMPTS, temperature=0) == outcome(make(speculate=False), PROMPTS, temperature=0)


def test_a_small_model_has_the_same_vocabulary():
    bytes_alone = byte_tokenizer(TINY.vocab_size)
    for mine, small in (
        (bytes_alone, tiny_model()),
        (None, tiny_model(tokenizer=bytes_alone)),
        (None, tiny_model(replace(TINY, vocab_size=504))),
    ):
        with pytest.raises(RequestError, match="has another vocabulary than"):
            tiny_model(tokenizer=mine, draft=small)
    with pytest.raises(RequestError, match="draft is 7; expected a model's name, path or Model"):
        tiny_model(draft=7)


def test_a_device_whose_rows_depend_on_each_other_gets_no_drafts():
    assert tiny_model()._loop.engine.speculation is None, "torch runs float32 on a CPU"


def test_a_stream_gets_every_token_by_itself(make):
    """A pass that accepts several tokens gives one output for each. A request ends at a stop among them."""
    model = make()
    full = model.generate(PROMPTS[1], max_tokens=60, temperature=0, ignore_eos=True)
    pieces = list(model.stream(PROMPTS[1], max_tokens=60, temperature=0, ignore_eos=True))
    assert "".join(pieces) == full.text
    stop = full.text[20:23]
    found = model.generate(PROMPTS[1], max_tokens=60, temperature=0, ignore_eos=True, stop=stop)
    assert found.text == full.text[: full.text.index(stop)]


def test_an_aborted_request_draws_nothing_more(make, monkeypatch):
    model = make()
    [request] = model._requests([PROMPTS[2]], SamplingParams(max_tokens=50, ignore_eos=True))
    with Engine(model._runner or model._loop.engine.runner, model._loop.engine.scheduler.limits) as engine:
        engine.add(request)
        while len(request.output_ids) < 10:
            engine.step()
        count = len(request.output_ids)
        engine.abort(request)
        assert engine.step() == []
    assert len(request.output_ids) == count


def naive(ids: list[int], count: int) -> tuple[list[int], int]:
    """`Drafts.draft`, written from its definition."""
    ends = [end for end in range(SHORTEST, len(ids)) if ids[end - SHORTEST : end] == ids[-SHORTEST:]][-PLACES:]
    best, at = 0, 0
    for end in ends:
        same = 0
        while same < min(LONGEST, end) and ids[end - 1 - same] == ids[-1 - same]:
            same += 1
        if same >= best:
            best, at = same, end
    return (ids[at : at + count], best) if best else ([], 0)


def test_a_draft_is_what_followed_the_longest_match():
    choose, found = random.Random(3), 0
    for _ in range(300):
        kinds = choose.choice((2, 3, 20))
        ids = [choose.randrange(kinds) for _ in range(choose.randrange(60))]
        drafts = Drafts()
        while len(drafts) < len(ids):
            drafts.add(ids[len(drafts) : len(drafts) + choose.randrange(1, 9)])
        assert drafts.draft(5) == naive(ids, 5)
        found += bool(drafts.draft(5)[0])
    assert found > 100


def test_the_cost_of_a_pass_is_read_between_those_measured():
    costs = Costs(16)
    assert costs.of(2) / costs.of(1) == pytest.approx(1.2 / 1.1)
    costs.read(1, 100.0)  # slow, because it compiles
    for seconds in (2.0, 9.0, 2.5):
        costs.read(1, seconds)
    assert costs.of(1) == 2.0, "disturbances only add"
    for _ in range(2):
        costs.read(5, 4.0)
    assert costs.of(3) == 3.0
    assert costs.of(6) == pytest.approx(4.0 * 1.6 / 1.5)
    for _ in range(READINGS):
        costs.read(1, 3.0)
    assert costs.of(1) == 3.0, "the oldest reading is dropped"


def test_a_rate_follows_the_guesses():
    rates = Rates()
    first = rates.of(5)
    for _ in range(20):
        rates.read(5, 0, 4)
    assert rates.of(5) < 0.15
    assert rates.of(6) == Rates().of(6) > first, "a longer match says more, and nothing was read of it"
    another = Rates(rates)
    assert another.of(5) == pytest.approx(rates.of(5)), "a new text begins with what others have shown"
    for _ in range(60):
        another.read(5, 4, 0)
    assert another.of(5) > 0.9
    assert rates.of(5) < 0.15
