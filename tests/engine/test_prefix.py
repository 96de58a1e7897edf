"""Pages found again by their tokens: which are found, which are dropped for others, and that no text changes."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from engine.test_decode import IN_C, NotCaptured, in_c
from support.clockwork import clockwork, tokens_of
from support.engines import check_pages, run, with_capture
from support.models import TINY, tiny_model
from support.toy_tokenizer import byte_tokenizer

from qwenkern import RequestError, SamplingParams
from qwenkern.cache import BlockTable, PageAllocator
from qwenkern.cache.prefix import PrefixIndex
from qwenkern.engine import Engine, Limits

PAGE = 64
__all__ = ["in_c"]  # a fixture


def ids(length: int, seed: int = 0) -> list[int]:
    choose = random.Random(seed)
    return [choose.randrange(503) for _ in range(length)]


@pytest.fixture
def allocator() -> PageAllocator:
    return PageAllocator(num_pages=8, page_size=4)


def begun(allocator: PageAllocator, tokens: list[int], salt: str = "") -> BlockTable:
    """The block table of a sequence of these tokens, after they are computed and entered into the prefix cache."""
    table = BlockTable(salt)
    assert allocator.begin(table, allocator.find(tokens, salt), len(tokens))
    table.length = len(tokens)
    allocator.remember(table, tokens)
    return table


def kept(allocator: PageAllocator, tokens: list[int], salt: str = "") -> list[int]:
    """The pages of a sequence that has ended. The prefix cache keeps them."""
    table = begun(allocator, tokens, salt)
    pages = list(table.pages)
    allocator.release(table)
    return pages


def found(allocator: PageAllocator, tokens: list[int], salt: str = "") -> list[int]:
    return [entry.page for entry in allocator.find(tokens, salt)]


A, B = [1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 4, 50, 60, 70, 80, 90]


def test_full_pages_are_found_as_far_as_the_tokens_are_the_same(allocator):
    pages = kept(allocator, A)
    assert found(allocator, A) == pages[:2], "the third page is not full"
    assert found(allocator, A[:8]) == pages[:2]
    assert found(allocator, A[:7]) == pages[:1]
    assert found(allocator, B) == pages[:1]
    assert found(allocator, A[1:]) == []
    assert found(allocator, [0, *A[1:]]) == []
    assert found(allocator, A[4:8]) == [], "a page is found after the page before it only"
    assert allocator.num_free_pages == 8
    assert allocator.num_kept_pages == 2


def test_tokens_are_compared_whatever_their_hash():
    """-1 and -2 have the same hash in CPython, and so do tuples of them."""
    assert hash((-1, 0)) == hash((-2, 0))
    index = PrefixIndex()
    index.add("", [-1, 0], 5)
    assert index.find("", [-2, 0], 2) == []
    assert [entry.page for entry in index.find("", [-1, 0], 2)] == [5]


def test_another_salt_finds_nothing(allocator):
    mine, theirs = kept(allocator, A, "me"), kept(allocator, A, "you")
    assert found(allocator, A, "me") == mine[:2]
    assert found(allocator, A, "you") == theirs[:2]
    assert found(allocator, A) == []
    assert set(mine[:2]).isdisjoint(theirs[:2])


def test_pages_have_as_many_users_as_tables(allocator):
    one = begun(allocator, A)
    two = begun(allocator, B)
    assert two.pages[0] == one.pages[0]
    assert allocator._users[one.pages[0]] == 2
    assert allocator.num_free_pages == 8 - 3 - 2
    shared = one.pages[0]
    allocator.release(one)
    assert allocator._users[shared] == 1
    assert shared not in allocator._kept, "a sequence still has it"
    allocator.release(two)
    assert allocator._users == [0] * 8
    assert allocator.num_free_pages == 8


def test_the_least_recently_used_goes_first_and_ends_before_beginnings(allocator):
    first, second = kept(allocator, A[:8]), kept(allocator, [9] * 8)
    assert allocator.num_kept_pages == 4
    kept(allocator, A[:8])  # used again, so the other one is now the least recently used
    kept(allocator, list(range(20, 36)))  # takes four free pages; the cache keeps the other four
    third = found(allocator, list(range(20, 36)))
    assert len(third) == 4
    filler = BlockTable()
    for expected in (second[1], second[0], first[1], first[0], *third[::-1]):
        allocator.extend(filler, 4)
        filler.length += 4
        assert filler.pages[-1] == expected
    assert found(allocator, A) == []
    with pytest.raises(RequestError, match="room for 0 more tokens"):
        allocator.extend(filler, 4)


def test_what_a_sequence_uses_is_never_dropped(allocator):
    table = begun(allocator, A)
    other = BlockTable()
    allocator.extend(other, 5 * 4)
    other.length = 5 * 4
    with pytest.raises(RequestError):
        allocator.extend(other, 1)
    assert set(other.pages).isdisjoint(table.pages)
    assert found(allocator, A) == table.pages[:2]


def test_a_sequence_whose_beginning_is_kept_needs_room_for_the_rest_only(allocator):
    kept(allocator, A[:8])
    filler = BlockTable()
    allocator.extend(filler, 5 * 4)
    assert allocator.num_free_pages == 3, "two of them are kept"
    table = BlockTable()
    assert not allocator.begin(table, allocator.find(A[:8]), 13)
    assert not table.pages
    assert allocator.num_kept_pages == 2, "what did not start has taken nothing"
    assert allocator.begin(table, allocator.find(A[:8]), 12)
    assert (table.length, allocator.num_free_pages) == (8, 0)


def test_the_same_tokens_computed_twice_are_kept_once(allocator):
    one, two = BlockTable(), BlockTable()
    for table in (one, two):  # both begin before the prefix cache has either of them
        assert allocator.begin(table, [], 9)
        table.length = 9
    for table in (one, two):
        allocator.remember(table, A)
    first = one.pages[:2]
    assert found(allocator, A) == first
    allocator.release(two)
    assert allocator.num_kept_pages == 0
    allocator.release(one)
    assert found(allocator, A) == first
    assert (allocator.num_kept_pages, allocator.num_free_pages) == (2, 8)


def test_what_follows_a_page_that_was_dropped_is_not_found(allocator):
    """Also if another page gets the number of the dropped one."""
    one = begun(allocator, A[:4])
    two = BlockTable()
    allocator.begin(two, [], 9)  # the same beginning, on other pages
    two.length = 9
    allocator.remember(two, A)
    assert found(allocator, A) == [one.pages[0], two.pages[1]]
    [dropped] = one.pages
    allocator.release(one)
    other = BlockTable()
    allocator.extend(other, 5 * 4)
    assert dropped in other.pages
    other.length = 4
    assert found(allocator, A) == []
    allocator.remember(other, [7, 7, 7, 7])
    assert found(allocator, [7, 7, 7, 7, 5, 6, 7, 8]) == [other.pages[0]]


def test_a_sequence_that_began_before_all_was_forgotten_stays_forgotten(allocator):
    """Its pages were computed with the old weights. New entries may get the numbers of old ones."""
    old = begun(allocator, A[:4])
    allocator.extend(old, 8)
    allocator.forget()
    assert found(allocator, A) == []
    new = begun(allocator, [30, 31, 32, 33])
    old.length = 9
    allocator.remember(old, A)
    assert found(allocator, A) == []
    assert found(allocator, [30, 31, 32, 33, *A[4:8]]) == new.pages
    allocator.release(old)
    assert allocator.num_kept_pages == 0
    assert allocator.num_free_pages == 7


# Whole models


def engine_of(model, **limits: Any) -> Engine:
    return Engine(model._runner, Limits(**{"prefill_chunk": 40} | limits))


def request_of(model, prompt: list[int], **how: Any):
    return model._requests([prompt], SamplingParams(**{"max_tokens": 4, "ignore_eos": True, "temperature": 0} | how))[0]


def computed(model, prompt: list[int], **how: Any) -> int:
    """Checks the text of a prompt. Returns the number of prompt tokens that were computed."""
    request = request_of(model, prompt, **how)
    tokens, hidden = [], model._runner.logits
    model._runner.logits = lambda parts, *args: (tokens.extend(parts), hidden(parts, *args))[1]
    engine = engine_of(model)
    for _ in run(engine, [request]):
        pass
    del model._runner.logits
    assert request.output_ids == tokens_of(request, model.config.vocab_size)
    read = sum(len(part) for _, part in tokens) - (request.max_tokens - 1)
    assert read == len(prompt) - request.num_found
    return read


@pytest.fixture
def model():
    return clockwork(NotCaptured(), vocab_size=503, cache_tokens=16 * PAGE)


def test_a_prompt_is_read_from_where_another_one_ended(model):
    prompt = ids(200)
    assert computed(model, prompt) == 200
    assert computed(model, prompt) == 200 - 192
    assert computed(model, prompt[:192]) == 64, "one token at least is computed, and pages are found whole"
    assert computed(model, prompt[:193]) == 1
    assert computed(model, prompt[:100] + ids(100, 1)) == 136
    assert computed(model, ids(200, 2)) == 200
    assert computed(model, prompt, cache_salt="theirs") == 200
    assert computed(model, prompt, cache_salt="theirs") == 8


def test_a_second_turn_reads_what_is_new(model):
    """The cache also has the answer without its last token, which was never computed."""
    request = request_of(model, ids(200), max_tokens=100)
    for _ in run(engine_of(model), [request]):
        pass
    turn = request.prompt_ids + request.output_ids + ids(30, 5)
    assert computed(model, turn) == 330 - 299 // PAGE * PAGE


def test_a_chat_says_what_was_found():
    model = tiny_model(tokenizer=byte_tokenizer(TINY.vocab_size))
    messages = [{"role": "user", "content": "x" * 150}]
    first = model.chat(messages, max_tokens=20, ignore_eos=True, temperature=0)
    assert first.num_cached_tokens == 0
    again = model.chat(messages, max_tokens=20, ignore_eos=True, temperature=0)
    assert again.num_cached_tokens == (first.num_prompt_tokens - 1) // PAGE * PAGE > 0
    assert again.token_ids == first.token_ids
    messages += [{"role": "assistant", "content": "y" * 80}, {"role": "user", "content": "z"}]
    second = model.chat(messages, max_tokens=20, ignore_eos=True, temperature=0)
    assert second.num_cached_tokens == first.num_prompt_tokens // PAGE * PAGE
    third = model.chat(messages, max_tokens=20, ignore_eos=True, temperature=0)
    assert third.num_cached_tokens > second.num_cached_tokens
    check_pages(model)


def test_without_a_prefix_cache_nothing_is_kept():
    model = tiny_model(prefix_cache=False)
    for _ in range(2):
        assert model.generate(ids(200), max_tokens=3, ignore_eos=True).num_cached_tokens == 0
    check_pages(model)
    assert model.cache.num_kept_pages == 0


def test_completions_of_one_prompt_find_it(model):
    how = {"n": 5, "max_tokens": 40, "ignore_eos": True, "temperature": 1.0, "seed": 2}
    expected = [request.output_ids for request in ran(model, ids(150), max_batch=8, finds_prefixes=False, **how)]
    computed(model, ids(150))
    for most in (8, 2):  # also with too few rows, so that some completions start on their own
        group = ran(model, ids(150), max_batch=most, **how)
        assert [request.output_ids for request in group] == expected
        assert group[0].num_found == 128


def ran(model, prompt, max_batch, finds_prefixes=True, **how):
    group = model._requests([prompt], SamplingParams(**how))
    engine = engine_of(model, max_batch=max_batch, finds_prefixes=finds_prefixes)
    for _ in run(engine, group[:1]):
        pass
    return group


def test_a_preempted_request_finds_its_pages():
    model = clockwork(NotCaptured(), vocab_size=503, cache_tokens=6 * PAGE)
    engine = engine_of(model)
    again = []
    start = engine.scheduler._start
    engine.scheduler._start = lambda r: (
        (started := start(r)) and (r.output_ids and again.append(r.table.length), started)[1]
    )
    requests = [request_of(model, ids(150, seed), max_tokens=60) for seed in range(2)]
    for _ in run(engine, requests):
        pass
    assert again, "nothing was preempted, so this shows nothing"
    assert max(again) >= 2 * PAGE
    assert [request.output_ids for request in requests] == [tokens_of(request, 503) for request in requests]


def test_scores_and_logits_read_everything(model):
    prompt = ids(200)
    expected = model.forward(prompt)
    model.generate(prompt, max_tokens=3, ignore_eos=True)
    assert torch.equal(model.forward(prompt), expected)
    assert len(model.score(prompt).logprobs) == 199
    assert model.generate(prompt, max_tokens=3, ignore_eos=True).num_cached_tokens == 192
    model.cache.forget()
    model.forward(prompt)
    assert model.generate(prompt, max_tokens=3, ignore_eos=True).num_cached_tokens == 192, "what they read is found"


def test_changed_weights_forget_all():
    model = tiny_model()
    prompt = ids(200)
    before = model.generate(prompt, max_tokens=8, ignore_eos=True, temperature=0)
    with torch.no_grad():
        model.module.model.embed_tokens.weight.mul_(-1.7)
    after = model.generate(prompt, max_tokens=8, ignore_eos=True, temperature=0)
    assert after.num_cached_tokens == 0
    model.cache.forget()
    fresh = model.generate(prompt, max_tokens=8, ignore_eos=True, temperature=0)
    assert fresh.token_ids == after.token_ids != before.token_ids
    assert model.generate(prompt, max_tokens=8, ignore_eos=True).num_cached_tokens == 192


def test_what_old_weights_read_is_not_found_by_new_ones():
    """The weights change between two chunks of a prompt."""
    model = tiny_model(prefill_chunk=40)
    prompt = ids(200)
    model._loop  # noqa: B018
    with engine_of(model) as engine:
        engine.add(request_of(model, prompt, max_tokens=30))
        for _ in range(3):
            engine.step()
        with torch.no_grad():
            model.module.model.embed_tokens.weight.mul_(-1.7)
        engine.add(late := request_of(model, prompt))
        while engine.has_requests:
            engine.step()
    assert late.num_found == 0
    expected = late.output_ids
    again = request_of(model, prompt)
    for _ in run(engine_of(model), [again]):
        pass
    assert again.output_ids == expected


@pytest.mark.processor
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("chunk", [64, 48, 96])
def test_deterministic_gives_the_same_bits_warm_or_cold(in_c, dtype, chunk):
    """Only whole chunks are found. 48 and 96 tokens are not multiples of a page."""
    how = {"max_tokens": 6, "temperature": 1.0, "seed": 3, "ignore_eos": True, "logprobs": 2}
    base = ids(400)
    prompts = [base[:n] for n in (400, 399, 64, 65, 192, 193, 330)] + [base[:200] + ids(90, 1), [*base[:96], 5]]
    cold = tiny_model(IN_C, dtype, deterministic=True, prefill_chunk=chunk, prefix_cache=False)
    expected = [cold.generate(prompt, **how).logprobs for prompt in prompts]
    warm = tiny_model(IN_C, dtype, deterministic=True, prefill_chunk=chunk)
    num_found = 0
    for _ in range(2):
        for prompt, logprobs in zip(prompts, expected, strict=True):
            completion = warm.generate(prompt, **how)
            assert completion.logprobs == logprobs
            assert completion.num_cached_tokens % chunk == 0
            num_found += completion.num_cached_tokens
    assert num_found
    assert [each.logprobs for each in warm.generate(prompts, **how)] == expected
    small = tiny_model(IN_C, dtype, deterministic=True, prefill_chunk=chunk, cache_tokens=512)  # drops pages
    assert [each.logprobs for each in small.generate(prompts * 2, **how)] == expected * 2
    check_pages(small)


@pytest.mark.processor
def test_warm_texts_are_those_of_a_cold_cache_up_to_rounding(in_c):
    model = tiny_model(IN_C, torch.float32)
    how = {"max_tokens": 6, "temperature": 0, "ignore_eos": True, "logprobs": 0}
    cold = model.generate(ids(200), **how)
    warm = model.generate(ids(200), **how)
    assert (cold.num_cached_tokens, warm.num_cached_tokens) == (0, 192)
    assert warm.token_ids == cold.token_ids
    assert [each.logprob for each in warm.logprobs] == pytest.approx([each.logprob for each in cold.logprobs], abs=1e-4)


def test_the_least_recently_used_texts_make_room():
    """The cache has room for two of three prompts: the least recently used one must be computed again."""
    model = with_capture(clockwork(NotCaptured(), vocab_size=503, cache_tokens=8 * PAGE), NotCaptured())
    one, two, three = (ids(200, seed) for seed in range(3))
    for prompt in (one, two, one):
        computed(model, prompt)
    assert computed(model, three) == 200
    assert computed(model, one) == 8
    assert computed(model, two) == 136, "of the other one, the end has made room"
