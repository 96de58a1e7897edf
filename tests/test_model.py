"""The facade: what it takes, what it gives, and what it says to bad requests."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from tolerances import assert_as_close_as
from toy import byte_tokenizer
from twins import TINY, in_other_orders, tiny_model, twin

import qwenkern
from qwenkern import Completion, Config, Model, RequestError, SamplingParams


@pytest.fixture(scope="module")
def model():
    return tiny_model(tokenizer=byte_tokenizer(TINY.vocab_size))


def test_the_class_has_the_name_of_its_module():
    import qwenkern.Model

    assert qwenkern.Model is Model
    assert isinstance(qwenkern.Model, type)


def test_one_prompt_gives_a_completion_and_a_list_a_list(model):
    assert isinstance(model.generate("ab", max_tokens=2), Completion)
    assert len(model.generate(["ab"], max_tokens=2)) == 1
    assert len(model.generate("ab", max_tokens=2, n=2)) == 2
    assert len(model.generate(["ab", [65, 66], [{"role": "user", "content": "x"}]], max_tokens=2)) == 3
    both = model.generate(["ab", model.tokenizer.encode("ab")], max_tokens=4)
    assert both[0].token_ids == both[1].token_ids
    assert both[0].num_prompt_tokens == 2


def test_params_and_keywords_mean_the_same(model):
    params = SamplingParams(max_tokens=4, temperature=1.0, seed=1)
    assert (
        model.generate("ab", params).token_ids == model.generate("ab", max_tokens=4, temperature=1.0, seed=1).token_ids
    )
    assert model.generate("ab", params, max_tokens=2).num_tokens == 2


def test_chat_is_the_rendered_prompt(model):
    messages = [{"role": "user", "content": "hi"}]
    rendered = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    expected = model.generate(rendered, max_tokens=8)
    assert model.chat(messages, max_tokens=8) == expected
    assert model.generate(messages, max_tokens=8) == expected
    assert "".join(model.stream(messages, max_tokens=8)) == expected.text


def test_the_completion_is_its_tokens_text(model):
    completion = model.generate("hello", max_tokens=40, ignore_eos=True)
    assert completion.text == model.tokenizer.decode(completion.token_ids)


@pytest.mark.processor
def test_forward_gives_the_logits_of_transformers_for_one_and_for_many(model):
    ids = torch.arange(40).reshape(2, 20)
    logits = model.forward(ids)
    assert logits.shape == (2, 20, TINY.vocab_size)
    assert logits.dtype == torch.float32
    with torch.no_grad():
        truth = twin(model, torch.float64)(ids).logits
        peers = torch.stack([each(ids).logits for each in in_other_orders(twin(model))])
    assert_as_close_as(logits, list(peers), truth)
    for one in (ids[1], ids[1].tolist()):  # a library's products of fewer rows may be sums in another order
        assert_as_close_as(model.forward(one), list(peers[:, 1]), truth[1])


def test_score_is_the_log_softmax_of_forward(model):
    small = tiny_model(prefill_chunk=3)
    ids = [5, 9, 2, 7, 7, 1, 4]
    expected = model.forward(ids).log_softmax(-1)[torch.arange(6), ids[1:]]
    score = small.score(ids)
    assert score.token_ids == ids
    assert score.logprobs == pytest.approx(expected.tolist(), abs=1e-5)
    assert [len(rows) for rows in small._logits([1] * 7)] == [3, 3, 1]
    assert [len(rows) for rows in model._logits([1] * 150)] == [64, 64, 22]
    assert score.perplexity == pytest.approx(expected.mean().neg().exp().item(), rel=1e-4)
    assert model.score("abc").token_ids == model.tokenizer.encode("abc")
    assert model.score([5]).logprobs == []
    assert model.score([5]).perplexity is None


def test_random_weights_are_reproducible():
    config = replace(Config.from_name("qwen2.5-0.5b"), num_hidden_layers=1, vocab_size=1000)
    first, second, other = (Model.from_config(config, seed=seed, device="cpu") for seed in (3, 3, 4))
    assert first.dtype == torch.bfloat16
    for (name, a), (_, b) in zip(first.module.named_parameters(), second.module.named_parameters(), strict=True):
        assert torch.equal(a, b), name
        assert torch.isfinite(a).all()
    assert not torch.equal(first.module.lm_head.weight, other.module.lm_head.weight)
    assert first.generate([1, 2, 3], max_tokens=2).text == ""


BAD_PROMPTS = [
    ("", "the prompt is empty"),
    ([], "the prompt is empty"),
    ([3, -1], "token id -1; expected 0 to 502"),
    ([3, 503], "token id 503; expected 0 to 502"),
    ([1] * 513, "the prompt has 513 tokens, and the context length is 512"),
    ("a\ud800b", "lone surrogate"),
    (3, "prompt is of type int"),
    (None, "prompt is of type NoneType"),
    (b"bytes", "prompt is of type bytes"),
    (["ab", ""], "the prompt is empty"),
    (["ab", 3.5], "prompt is of type float"),
]


@pytest.mark.parametrize(("prompt", "message"), BAD_PROMPTS, ids=[repr(p)[:20] for p, _ in BAD_PROMPTS])
def test_bad_prompts(model, prompt, message):
    with pytest.raises(RequestError, match=message):
        model.generate(prompt, max_tokens=2)
    assert model.cache.num_free_tokens == model.cache.num_tokens


BAD_REQUESTS = [
    ({"max_tokens": 500}, r"100 tokens and max_tokens 500 make 600, and the context length is 512"),
    ({"max_tokens": 10**12}, r"make 1000000000100, and the context length is 512"),
    ({"max_token": 5}, r"'max_token' is not a sampling parameter; expected one of: .*max_tokens"),
    ({"logit_bias": {503: 1.0}}, "logit_bias has token id 503; expected 0 to 502"),
    ({"stop_token_ids": [9999]}, "stop_token_ids has token id 9999"),
    ({"params": {"max_tokens": 3}}, "params is of type dict; expected SamplingParams"),
    ({"n": 1_000_000}, "n is 1000000"),
]


@pytest.mark.parametrize(("keywords", "message"), BAD_REQUESTS, ids=str)
def test_bad_requests(model, keywords, message):
    with pytest.raises(RequestError, match=message):
        model.generate([1] * 100, **keywords)


def test_a_stream_has_one_completion(model):
    with pytest.raises(RequestError, match="n is 2; a stream has one completion"):
        model.stream("ab", n=2)


def test_without_a_tokenizer_only_ids(model):
    bare = tiny_model()
    for call in (lambda: bare.generate("text"), lambda: bare.chat([{"role": "user", "content": "x"}])):
        with pytest.raises(RequestError, match="no tokenizer; expected prompts as lists of token ids"):
            call()
    with pytest.raises(RequestError, match="stop strings need a tokenizer"):
        bare.generate([1], stop="x")


@pytest.mark.parametrize("ids", [torch.zeros(2, 2, 2, dtype=torch.int64), torch.zeros(3), torch.tensor(3)], ids=str)
def test_forward_refuses_what_are_no_ids(model, ids):
    with pytest.raises(RequestError, match=r"expected \[T\] or \[B, T\] integers"):
        model.forward(ids)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"device": "tpu"}, "device is 'tpu'; expected 'auto', 'cpu', 'cuda'"),
        ({"device": "meta"}, "device is 'meta'"),
        ({"device": "cuda:99"}, "device is 'cuda:99', and torch sees"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"dtype": torch.float64}, "dtype is torch.float64"),
        ({"prefill_chunk": -1}, "prefill_chunk is -1"),
        ({"cache_tokens": -1}, "cache_tokens is -1"),
    ],
)
def test_bad_places_to_run(keywords, message):
    with pytest.raises(RequestError, match=message):
        Model.from_config(TINY, **keywords)


def test_every_error_is_an_error_of_ours():
    for error in (qwenkern.CheckpointError, qwenkern.ConfigError, qwenkern.RequestError):
        assert issubclass(error, qwenkern.Error)


def test_twins_agree(model):
    ids = torch.arange(30)
    with torch.no_grad():
        assert torch.equal(model.forward(ids).argmax(-1), twin(model)(ids[None]).logits[0].argmax(-1))


def test_importing_prints_nothing():
    done = subprocess.run([sys.executable, "-c", "import qwenkern.Model"], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
