"""Generation: greedy text against transformers, and the same text for any batching, chunking or preemption."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from support.engines import Gate, all_free, check_pages, eventually, read, run
from support.models import TINY, reference_model, tiny_model
from support.toy_tokenizer import byte_tokenizer

from qwenkern import NonFiniteError, RequestError, SamplingParams
from qwenkern.cache import PagedCache
from qwenkern.engine import Engine, Limits, Runner
from qwenkern.engine import engine as engine_module
from qwenkern.engine.stop_strings import StopStrings
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
    """transformers' 24 greedy tokens for each prompt."""
    theirs = reference_model(model)
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
    single = [model.generate(prompt, max_tokens=24, ignore_eos=True).token_ids for prompt in PROMPTS]
    assert single == greedy


def test_a_ragged_batch_gives_the_same_tokens(model, greedy):
    together = model.generate(PROMPTS, max_tokens=24, ignore_eos=True)
    assert [completion.token_ids for completion in together] == greedy
    assert [completion.prompt_index for completion in together] == list(range(len(PROMPTS)))


@pytest.mark.parametrize("chunk", [1, 7, 64, 100, 1000])
def test_any_chunk_of_prefill_gives_the_same_tokens(greedy, chunk):
    model = tiny_model(prefill_chunk=chunk)
    together = model.generate(PROMPTS, max_tokens=24, ignore_eos=True)
    assert [completion.token_ids for completion in together] == greedy


def test_a_cache_too_small_for_all_preempts_and_starts_again(model, greedy):
    small = tiny_model(cache_tokens=448)  # seven pages; the longest sequence needs four
    released = []
    release = small.cache.release
    small.cache.release = lambda table: (released.append(table.length), release(table))
    together = small.generate(PROMPTS, max_tokens=24, ignore_eos=True)
    assert [completion.token_ids for completion in together] == greedy
    assert len(released) > len(PROMPTS), "nothing was preempted, so this shows nothing"
    check_pages(small)


def test_every_page_comes_back(model):
    model.generate(PROMPTS, max_tokens=5, n=3, temperature=1.0)
    check_pages(model)
    with Gate(model) as gate:
        with model.stream(PROMPTS[5], max_tokens=50, ignore_eos=True) as stream:
            gate.steps(4)
            read(stream, 3)
            assert not all_free(model)
        gate.steps(1)
        assert all_free(model), "the pages are free after the pass in progress"


def test_completions_of_one_prompt_share_it_and_differ(model):
    first = model.generate(PROMPTS[4], n=4, temperature=1.0, seed=5, max_tokens=12, ignore_eos=True)
    assert [completion.sample_index for completion in first] == [0, 1, 2, 3]
    assert len({tuple(completion.token_ids) for completion in first}) == 4
    again = model.generate([PROMPTS[0], PROMPTS[4]], n=4, temperature=1.0, seed=5, max_tokens=12, ignore_eos=True)
    assert [c.token_ids for c in again[4:]] == [c.token_ids for c in first], "the batch changes no one's text"
    single = model.generate(PROMPTS[4], temperature=1.0, seed=5, max_tokens=12, ignore_eos=True)
    assert single.token_ids == first[0].token_ids


def test_forks_that_find_no_page_wait(greedy):
    small = tiny_model(cache_tokens=448)
    completions = small.generate(PROMPTS[5], n=6, temperature=0, max_tokens=24, ignore_eos=True)
    assert [completion.token_ids for completion in completions] == [greedy[5]] * 6


@pytest.mark.parametrize("deterministic", [False, True])
def test_no_pass_has_more_rows_than_the_limit(model, deterministic):
    """Completions of one prompt wait for free rows as sequences do, and their texts stay the same."""
    how = {"temperature": 1.0, "seed": 5, "max_tokens": 6, "ignore_eos": True}
    expected = [each.token_ids for prompt in PROMPTS[:4] for each in model.generate(prompt, n=5, **how)]
    requests = model._requests(PROMPTS[:4], SamplingParams(n=5, **how))
    rows, tokens = [], []
    sampled = engine_module.sample
    forward = Runner.logits

    def sample_spy(logits, *args):
        rows.append(len(logits))
        return sampled(logits, *args)

    def forward_spy(runner, parts, *args):
        rows.append(len(parts))
        tokens.append(sum(len(ids) for _, ids in parts))
        return forward(runner, parts, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "sample", sample_spy)
        patch.setattr(Runner, "logits", forward_spy)
        first = [request for request in requests if not request.sample_index]
        limits = Limits(512, max_batch=10, batch_invariant=deterministic, finds_prefixes=False)
        for _ in run(Engine(Runner(model.module, model.cache), limits), first):
            pass
    assert [request.output_ids for request in requests] == expected
    assert max(rows) == 10
    assert sum(tokens) == sum(map(len, PROMPTS[:4])) + 5 * 4 * 5, "a prompt was computed twice"


@pytest.mark.parametrize("deterministic", [False, True])
def test_more_completions_than_a_pass_holds(model, deterministic):
    how = {"temperature": 1.0, "seed": 5, "max_tokens": 3, "ignore_eos": True}
    expected = model.generate(PROMPTS[3], n=7, **how)
    requests = model._requests([PROMPTS[3]], SamplingParams(n=7, **how))
    engine = Engine(Runner(model.module, model.cache), Limits(512, max_batch=3, batch_invariant=deterministic))
    sizes = [0]
    for _ in run(engine, requests[:1]):
        sizes.append(len(engine.scheduler.running))
    assert [request.output_ids for request in requests] == [each.token_ids for each in expected]
    assert max(sizes) <= 3


DAMAGED = [7, 300, 21]  # the embedding of its second token is NaN


def damaged(value: float = float("nan"), **keywords):
    model = tiny_model(**keywords)
    with torch.no_grad():
        model.module.model.embed_tokens.weight[300, 3] = value
    return model


@pytest.mark.parametrize(
    "how",
    [{"temperature": 0}, {"temperature": 1.0, "seed": 1}, {"top_k": 4, "temperature": 1.0, "seed": 1}, {"logprobs": 2}],
)
def test_logits_that_are_not_finite_are_an_error(how):
    model = damaged()
    fine = model.generate([7, 21], max_tokens=5, **how).token_ids
    assert len(fine) == 5
    with pytest.raises(
        NonFiniteError, match=r"^prompt_index 1, sample_index 0: .*after position 2 .*float32: the weights"
    ):
        model.generate([[7, 21], DAMAGED, [9]], max_tokens=50, ignore_eos=True, **how)
    check_pages(model)
    with Gate(model) as gate:
        others = model.stream([7, 21], max_tokens=5, ignore_eos=True, temperature=0)
        gate.steps(2)
        broken = model.stream(DAMAGED, max_tokens=5)
        gate.steps(2)
    with pytest.raises(NonFiniteError), broken:
        list(broken)
    list(others)
    assert others.completion.num_tokens == 5, "another call goes on"


def test_the_position_is_that_of_the_token_read_last():
    """Token 300 is drawn, and not in the prompt."""
    model = damaged(prefill_chunk=2)
    bias = {300: 100.0}
    with pytest.raises(NonFiniteError, match="after position 4 "):
        model.generate([7, 21, 3, 4], max_tokens=5, temperature=0, logit_bias=bias)
    assert model.generate([7, 21, 3, 4], max_tokens=1, temperature=0, logit_bias=bias).token_ids == [300]


def test_scores_of_what_is_not_finite_are_an_error():
    model = damaged(prefill_chunk=1)
    assert len(model.score([7, 300]).logprobs) == 1, "what comes after 300 is not asked for"
    with pytest.raises(NonFiniteError, match=r"^score: the logits after position 1 .*float32"):
        model.score(DAMAGED)
    check_pages(model)
    assert model.forward(DAMAGED).isnan().any(-1).tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("dtype", "advice"),
    [
        (torch.float16, "float16: try dtype='bfloat16' or 'float32'; if that does not help, the weights are damaged"),
        (torch.bfloat16, "bfloat16: try dtype='float32'; if"),
    ],
)
def test_an_overflow_says_what_to_try(dtype, advice):
    model = damaged(float("inf"), dtype=dtype)
    with pytest.raises(NonFiniteError, match=advice):
        model.generate(DAMAGED, max_tokens=5)


def test_the_largest_random_number_draws_what_is_allowed(model, monkeypatch):
    monkeypatch.setattr("random.Random.random", lambda self: 1 - 2**-53)
    most_probable = model.generate([1, 2], max_tokens=1, logprobs=3, temperature=0).logprobs[0].top
    for few in (1, 2, 3):
        (drawn,) = model.generate([1, 2], max_tokens=1, temperature=2.0, top_k=few).token_ids
        assert drawn == list(most_probable)[few - 1]


def test_without_a_seed_texts_differ_from_call_to_call(model):
    texts = {tuple(model.generate([1, 2], temperature=2.0, max_tokens=12, ignore_eos=True).token_ids) for _ in range(3)}
    assert len(texts) == 3


def test_two_streams_may_be_read_in_turns(model, greedy):
    streams = [model.stream(PROMPTS[n], max_tokens=24, ignore_eos=True) for n in (3, 5)]
    for _ in range(24):
        for stream in streams:
            read(stream, 1)
    assert [stream.completion.token_ids for stream in streams] == [greedy[3], greedy[5]]
    for stream in streams:
        stream.close()


def test_a_stream_may_be_closed_while_another_thread_reads_it(model):
    with Gate(model) as gate:
        stream = model.stream([65, 66, 67], max_tokens=400, ignore_eos=True)
        eventually(gate.has_come.is_set)
        pieces: list[str] = []
        reader = threading.Thread(target=lambda: pieces.extend(stream), daemon=True)
        reader.start()
        eventually(stream._call._reading.locked)
        with pytest.raises(RequestError, match="another thread is reading this; expected one reader at a time"):
            next(stream)
        stream.close()
        reader.join(20)
        assert not reader.is_alive(), "it does not wait for the pass in progress"
        gate.steps(1)
    assert "".join(pieces) == stream.completion.text
    assert stream.completion.num_tokens < 400
    check_pages(model)


@pytest.mark.parametrize("in_a_cycle", [False, True])
def test_streams_that_are_forgotten_give_their_pages_back(model, in_a_cycle):
    with Gate(model) as gate:
        stream = model.stream(PROMPTS[5], max_tokens=380, ignore_eos=True)
        gate.steps(3)
        read(stream, 1)
        if in_a_cycle:
            stream.itself = stream
        alive = weakref.ref(stream)
        del stream
        if in_a_cycle:
            assert alive()
            gate.steps(1)
            assert not all_free(model)
            gc.collect()
        assert not alive()
        gate.steps(1)
        assert all_free(model)


def test_an_error_of_the_reader_takes_no_pages(model):
    def reads():
        for _ in model.stream([65, 66, 67], max_tokens=50, ignore_eos=True):
            raise KeyError("theirs")

    with pytest.raises(KeyError, match="theirs"):
        reads()
    check_pages(model)

    def reads_with():
        with model.stream([65, 66, 67], max_tokens=50, ignore_eos=True) as stream:
            kept.append(stream)
            next(stream)
            raise KeyError("theirs")

    kept = []
    with pytest.raises(KeyError, match="theirs"):
        reads_with()
    check_pages(model)


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
    """A cache for exactly one sequence serves it, and refuses a sequence with one token more."""
    exact = tiny_model(cache_tokens=128)
    assert exact.generate([3] * 100, max_tokens=28, ignore_eos=True).num_tokens == 28
    with pytest.raises(RequestError, match=r"100 tokens and max_tokens 29 make 129.*cache.*128"):
        exact.generate([3] * 100, max_tokens=29)


def test_pages_of_others_are_not_read(model, greedy):
    """Memory to which no token of the sequence was written may contain anything, also NaN."""
    poisoned = tiny_model()
    poisoned.cache = PagedCache(TINY, 2048, torch.float32, torch.device("cpu"))
    for each in (tensor for pages in poisoned.cache.pages for tensor in pages.tensors):
        each.fill_(float("nan"))
    together = poisoned.generate(PROMPTS, max_tokens=24, ignore_eos=True)
    assert [completion.token_ids for completion in together] == greedy
