"""The loop: greedy text against transformers, and the same text however sequences are batched, chunked or evicted."""

from __future__ import annotations

import pytest
import torch
from toy import byte_tokenizer
from twins import TINY, tiny_model, twin

from qwenkern import RequestError
from qwenkern.cache import PagedCache
from qwenkern.generate import StopStrings
from qwenkern.generation import Generation

PROMPTS = [
    [n * 7 % 503 for n in range(start, start + length)]
    for start, length in ((0, 1), (5, 2), (9, 63), (3, 64), (8, 65), (4, 130), (2, 17), (6, 200))
]
pytestmark = pytest.mark.processor


@pytest.fixture(scope="module")
def model():
    return tiny_model(tokenizer=byte_tokenizer(TINY.vocab_size))


@pytest.fixture(scope="module")
def greedy(model):
    """24 tokens after each prompt, by transformers."""
    theirs = twin(model)
    with torch.no_grad():
        return [_continue(theirs, prompt) for prompt in PROMPTS]


def _continue(theirs, prompt):
    ids = torch.tensor([prompt])
    out = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, min_new_tokens=24, do_sample=False, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()


def test_greedy_tokens_are_those_of_transformers(model, greedy):
    assert len({tuple(tokens) for tokens in greedy}) == len(PROMPTS), "the prompts must lead to different texts"
    assert all(len(set(tokens)) > 3 for tokens in greedy)
    alone = [model.generate(prompt, max_tokens=24, ignore_eos=True).token_ids for prompt in PROMPTS]
    assert alone == greedy


def test_a_ragged_batch_gives_the_same_tokens(model, greedy):
    together = model.generate(PROMPTS, max_tokens=24, ignore_eos=True)
    assert [completion.token_ids for completion in together] == greedy
    assert [completion.prompt_index for completion in together] == list(range(len(PROMPTS)))


@pytest.mark.parametrize("chunk", [1, 7, 64, 100, 1000])
def test_any_chunk_of_prefill_gives_the_same_tokens(greedy, chunk):
    model = tiny_model(prefill_chunk=chunk)
    together = model.generate(PROMPTS, max_tokens=24, ignore_eos=True)
    assert [completion.token_ids for completion in together] == greedy


def test_a_cache_too_small_for_all_evicts_and_starts_again(model, greedy):
    small = tiny_model(cache_tokens=448)  # seven pages; the longest sequence needs four of them
    evicted = []
    release = small.cache.release
    small.cache.release = lambda table: (evicted.append(table.length), release(table))
    together = small.generate(PROMPTS, max_tokens=24, ignore_eos=True)
    assert [completion.token_ids for completion in together] == greedy
    assert len(evicted) > len(PROMPTS), "nothing was evicted, so this shows nothing"
    assert small.cache.num_free_tokens == small.cache.num_tokens


def test_every_page_comes_back(model):
    model.generate(PROMPTS, max_tokens=5, n=3, temperature=1.0)
    assert model.cache.num_free_tokens == model.cache.num_tokens
    with model.stream(PROMPTS[5], max_tokens=50, ignore_eos=True) as stream:
        for _ in range(3):
            next(stream._steps)
        assert model.cache.num_free_tokens < model.cache.num_tokens
    assert model.cache.num_free_tokens == model.cache.num_tokens


def test_completions_of_one_prompt_share_it_and_differ(model):
    first = model.generate(PROMPTS[4], n=4, temperature=1.0, seed=5, max_tokens=12, ignore_eos=True)
    assert [completion.sample_index for completion in first] == [0, 1, 2, 3]
    assert len({tuple(completion.token_ids) for completion in first}) == 4
    again = model.generate([PROMPTS[0], PROMPTS[4]], n=4, temperature=1.0, seed=5, max_tokens=12, ignore_eos=True)
    assert [c.token_ids for c in again[4:]] == [c.token_ids for c in first], "the batch changes no one's text"
    alone = model.generate(PROMPTS[4], temperature=1.0, seed=5, max_tokens=12, ignore_eos=True)
    assert alone.token_ids == first[0].token_ids


def test_forks_that_find_no_page_wait(greedy):
    small = tiny_model(cache_tokens=448)
    completions = small.generate(PROMPTS[5], n=6, temperature=0, max_tokens=24, ignore_eos=True)
    assert [completion.token_ids for completion in completions] == [greedy[5]] * 6


def test_the_largest_random_number_draws_what_is_allowed(model, monkeypatch):
    monkeypatch.setattr("random.Random.random", lambda self: 1 - 2**-53)
    likeliest = model.generate([1, 2], max_tokens=1, logprobs=3, temperature=0).logprobs[0].top
    for few in (1, 2, 3):
        (drawn,) = model.generate([1, 2], max_tokens=1, temperature=2.0, top_k=few).token_ids
        assert drawn == list(likeliest)[few - 1]


def test_without_a_seed_texts_differ_from_call_to_call(model):
    texts = {tuple(model.generate([1, 2], temperature=2.0, max_tokens=12, ignore_eos=True).token_ids) for _ in range(3)}
    assert len(texts) == 3


def test_two_streams_may_be_read_in_turns(model, greedy):
    streams = [model.stream(PROMPTS[n], max_tokens=24, ignore_eos=True) for n in (3, 5)]
    for _ in range(24):
        for stream in streams:
            next(stream._steps)
    assert [stream.completion.token_ids for stream in streams] == [greedy[3], greedy[5]]
    for stream in streams:
        stream.close()


def test_threads_may_share_a_model(model, greedy):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda p: model.generate(p, max_tokens=24, ignore_eos=True).token_ids, PROMPTS))
    assert found == greedy


def test_an_end_id_ends_the_text(model, greedy, monkeypatch):
    end = greedy[5][6]
    expected = greedy[5][: greedy[5].index(end) + 1]
    completion = model.generate(PROMPTS[5], max_tokens=24, stop_token_ids=[end])
    assert (completion.token_ids, completion.finish_reason, completion.stop_reason) == (expected, "stop", end)
    monkeypatch.setattr(model, "generation", Generation(end_ids=frozenset({end})))
    assert model.generate(PROMPTS[5], max_tokens=24).token_ids == expected
    assert model.generate(PROMPTS[5], max_tokens=24, ignore_eos=True).token_ids == greedy[5]
    longer = model.generate(PROMPTS[5], max_tokens=24, min_tokens=12)
    assert end not in longer.token_ids[:12]
    assert longer.num_tokens >= 12


def test_max_tokens_and_the_context_end_it_for_length(model):
    completion = model.generate(PROMPTS[2], max_tokens=3, ignore_eos=True)
    assert (completion.num_tokens, completion.finish_reason) == (3, "length")
    full = model.generate([1] * 500, ignore_eos=True)
    assert (full.num_tokens, full.finish_reason) == (12, "length")
    brim = model.generate([1] * 512, ignore_eos=True)
    assert model.generate([1] * 512, ignore_eos=True, max_tokens=1).token_ids == brim.token_ids
    with pytest.raises(RequestError, match="512 tokens and max_tokens 2 make 514, and the context length is 512"):
        model.generate([1] * 512, max_tokens=2)
    assert (brim.num_tokens, brim.finish_reason) == (1, "length")


def test_a_stop_string_ends_before_itself(model):
    full = model.generate([65, 66, 67], max_tokens=60, ignore_eos=True)
    assert len(full.text) > 12
    stop = full.text[5:8]
    at = full.text.index(stop)
    completion = model.generate([65, 66, 67], max_tokens=60, ignore_eos=True, stop=["not in there", stop])
    assert completion.text == full.text[:at]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    with model.stream([65, 66, 67], max_tokens=60, ignore_eos=True, stop=stop) as stream:
        assert "".join(stream) == full.text[:at]


def test_stream_pieces_make_up_the_text(model):
    full = model.generate([65, 66, 67], max_tokens=60, ignore_eos=True)
    pieces = list(model.stream([65, 66, 67], max_tokens=60, ignore_eos=True))
    assert "".join(pieces) == full.text
    assert len(pieces) > 5


@pytest.mark.parametrize(
    ("stops", "pieces", "expected", "found"),
    [
        (("END",), ["abc", "E", "N", "X", "E", "ND", "more"], "abcENX", "END"),
        (("aab",), ["a", "a", "a", "b"], "a", "aab"),
        (("bc", "b"), ["ab", "c"], "a", "b"),
        (("c", "bc"), ["ab", "c"], "a", "bc"),
        (("xyz",), ["xy"], "xy", None),
        ((), ["any", "thing"], "anything", None),
        (("🙂",), ["a", "🙂b"], "a", "🙂"),
    ],
)
def test_stop_strings(stops, pieces, expected, found):
    scanner, text = StopStrings(stops), ""
    for piece in pieces:
        text += scanner.add(piece)
        if scanner.found:
            break
    assert text + scanner.finish() == expected
    assert scanner.found == found


def test_stop_strings_hold_back_no_more_than_they_must():
    scanner = StopStrings(("END",))
    assert [scanner.add(piece) for piece in ["ab", "E", "N", "E", "x"]] == ["ab", "", "", "EN", "Ex"]


def test_logprobs_of_a_greedy_text_are_those_of_its_score(model):
    completion = model.generate(PROMPTS[2], max_tokens=8, ignore_eos=True, logprobs=2)
    score = model.score(PROMPTS[2] + completion.token_ids)
    assert [entry.token_id for entry in completion.logprobs] == completion.token_ids
    assert [entry.logprob for entry in completion.logprobs] == pytest.approx(score.logprobs[-8:], abs=1e-4)
    assert all(entry.logprob == max(entry.top.values()) for entry in completion.logprobs)


def test_the_last_page_of_a_long_sequence_is_counted(model):
    """A cache with room for exactly one sequence serves it, and refuses one token more."""
    exact = tiny_model(cache_tokens=128)
    assert exact.generate([3] * 100, max_tokens=28, ignore_eos=True).num_tokens == 28
    with pytest.raises(RequestError, match=r"100 tokens and max_tokens 29 make 129.*cache.*128"):
        exact.generate([3] * 100, max_tokens=29)


def test_pages_of_others_are_not_read(model, greedy):
    """Memory that no token of the sequence wrote may hold anything, NaN too."""
    poisoned = tiny_model()
    poisoned.cache = PagedCache(TINY, 2048, torch.float32, torch.device("cpu"))
    poisoned.cache.k.fill_(float("nan"))
    poisoned.cache.v.fill_(float("nan"))
    together = poisoned.generate(PROMPTS, max_tokens=24, ignore_eos=True)
    assert [completion.token_ids for completion in together] == greedy
