"""The facade: its arguments, its results, and its errors for bad requests."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.models import TINY, in_other_orders, reference_model, save_checkpoint, tiny_model
from support.tolerances import assert_as_close_as
from support.toy_tokenizer import CHAT_TEMPLATE, byte_library, byte_tokenizer
from tokenizers import processors

import qwenkern
from qwenkern import Completion, Config, ConfigError, Model, RequestError, SamplingParams
from qwenkern.footprint import cache_room, layout_of
from qwenkern.text.chat_template import ChatTemplate
from qwenkern.text.tokenizer import Tokenizer


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


@pytest.mark.parametrize("prompt", ["Hello", [1, 2], []], ids=repr)
def test_a_chat_takes_messages_alone(model, prompt):
    with pytest.raises(RequestError, match=r"messages is .*; expected a list of messages"):
        model.chat(prompt, max_tokens=1)


def test_tools_reach_the_template_from_every_call():
    template = "{% for tool in tools or [] %}{{ tool.name }}{% endfor %}{{ messages[0].content }}"
    tokenizer = Tokenizer(
        byte_library(),
        "toy",
        TINY.vocab_size,
        (),
        ChatTemplate.from_gguf({"tokenizer.chat_template": template}, {}, "toy"),
    )
    model = tiny_model(tokenizer=tokenizer)
    messages, tools = [{"role": "user", "content": "hi"}], [{"name": "tide"}]
    expected = model.generate("tidehi", max_tokens=4)
    assert model.generate(messages, tools=tools, max_tokens=4) == expected
    assert model.chat(messages, tools=tools, max_tokens=4) == expected
    assert model.generate([messages], tools=tools, max_tokens=4) == [expected]
    stream = model.stream(messages, tools=tools, max_tokens=4)
    assert "".join(stream) == expected.text
    for prompt, found in (("text", "a text"), ([1, 2], "token ids")):
        with pytest.raises(RequestError, match=f"tools need chat messages as the prompt, found {found}"):
            model.generate(prompt, tools=tools)
    with pytest.raises(RequestError, match="tools: found 'tide'; expected a list of dicts"):
        model.generate(messages, tools="tide")


def test_ids_may_be_numpys_and_a_range(model):
    expected = model.generate([3, 4, 5], max_tokens=4)
    for ids in (list(np.arange(3, 6)), tuple(torch.arange(3, 6)), range(3, 6)):
        assert model.generate(ids, max_tokens=4) == expected
        assert model.score(ids).token_ids == [3, 4, 5]


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
        truth = reference_model(model, torch.float64)(ids).logits
        peers = torch.stack([each(ids).logits for each in in_other_orders(reference_model(model))])
    assert_as_close_as(logits, list(peers), truth)
    for one in (ids[1], ids[1].tolist()):  # a library's products of fewer rows may be sums in another order
        assert_as_close_as(model.forward(one), list(peers[:, 1]), truth[1])


def test_forward_keeps_logits_once(monkeypatch, model):
    """In the tensor that it returns; of the passes' own, those of one at a time."""
    alive, read = [], model._read

    def watched(rows, take):
        def counted(index, part):
            assert sum(each() is not None for each in alive) <= 1
            alive.append(weakref.ref(part))
            take(index, part)

        read(rows, counted)

    expected = model.forward([1] * 150)
    monkeypatch.setattr(model, "_read", watched)
    assert torch.equal(model.forward([1] * 150), expected)
    assert len(alive) == 3


def test_forward_says_how_much_memory_is_missing(monkeypatch, model):
    empty = torch.empty

    def full(shape, **keywords):
        if shape == (2, 3, TINY.vocab_size):
            raise torch.OutOfMemoryError
        return empty(shape, **keywords)

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(RequestError, match=r"ids has 2 x 3 tokens, whose logits take 0.0 GB, more than cpu has left"):
        model.forward([[1, 2, 3]] * 2)


GB = 10**9
NEEDS = 4096 * (
    151936 * 4 + (2 + 1) * 11008 * 2 + 4 * 2048 * 2
)  # logits, gate and up, their product; x, residual, norm


@pytest.mark.parametrize(
    ("total", "weights", "room", "least"),
    [
        (80 * GB, 6.2 * GB, NEEDS, 50 * GB),
        (24 * GB, 6.2 * GB, NEEDS, 12 * GB),  # such a card's logits did not fit beside a cache of all but a tenth
        (16 * GB, 6.2 * GB, 0.1 * 16 * GB, 6 * GB),
        (8 * GB, 6.2 * GB, 0.1 * 8 * GB, 0.3 * GB),
    ],
)
def test_the_default_cache_leaves_room_for_the_logits_of_a_chunk(monkeypatch, total, weights, room, least):
    """Of the 3B in bfloat16, with half a gigabyte for CUDA's own."""
    free = int(total - weights - GB // 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, total))
    config = Config.from_name("qwen2.5-3b")
    tokens = cache_room(layout_of(config, torch.device("cuda")), torch.device("cuda"), None, 4096, 0)
    cache = tokens * 36 * 2 * 2 * 128 * 2  # layers, keys and values, heads, their size, bytes
    assert free - cache >= room + total // 20 * (room == NEEDS)
    assert cache >= min(least, 64 * 32768 * 36 * 2 * 2 * 128 * 2)


def test_score_is_the_log_softmax_of_forward(model):
    small = tiny_model(prefill_chunk=3)
    ids = [5, 9, 2, 7, 7, 1, 4]
    expected = model.forward(ids).log_softmax(-1)[torch.arange(6), ids[1:]]
    score = small.score(ids)
    assert score.token_ids == ids
    assert score.logprobs == pytest.approx(expected.tolist(), abs=1e-5)
    for reader, length, expected_sizes in ((small, 7, [3, 3, 1]), (model, 150, [64, 64, 22])):
        sizes = []
        reader._read([[1] * length], lambda _, rows, sizes=sizes: sizes.append(len(rows)))
        assert sizes == expected_sizes
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
    ([True, False], "prompt is of type bool"),
    ([[1], None], "prompt is of type NoneType"),
    ([[1, [2]]], "prompt is of type int|expected"),
    ({"role": "user"}, "prompt is of type dict"),
    ({1, 2}, "prompt is of type set"),
    ((np.array([1, 2]),), "prompt is of type ndarray"),
    (range(10**30), "token id 512; expected 0 to 502"),
    ([1, 2**70], "token id 1180591620717411303424; expected 0 to 502"),
    ([{"role": "user", "content": "a"}, "b"], "prompt is of type dict"),
    ([{"role": "user", "content": [{"type": "image_url"}]}], "of type 'image_url'; expected 'text'"),
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


NO_IDS = [
    torch.zeros(2, 2, 2, dtype=torch.int64),
    torch.zeros(3),
    torch.tensor(3),
    torch.tensor([True]),
    torch.zeros(3, dtype=torch.complex64),
    torch.zeros(3, dtype=torch.int64, device="meta"),
    [],
    [[1, 2], [3]],
    [[[1]]],
    [1, 2**70],
    [1, None],
    ["a"],
    "text",
    None,
    [1.5],
    [True],
    {1: 2},
    object,
]


@pytest.mark.parametrize("ids", NO_IDS, ids=repr)
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
        ({"cache_tokens": True}, "cache_tokens is True"),
        ({"cache_tokens": 10**15}, "cache_tokens is 1000000000000000; expected at most [0-9]+: cpu has no more memory"),
        ({"cache_tokens": 10**400}, "cache_tokens is 1000"),
        ({"cache_tokens": "64"}, "cache_tokens is '64'"),
        ({"prefill_chunk": True}, "prefill_chunk is True"),
        ({"prefill_chunk": 2.0}, "prefill_chunk is 2.0"),
        ({"deterministic": "yes"}, "deterministic is 'yes'; expected True or False"),
        ({"threads": "2"}, "threads is '2'; expected a whole number from 1"),
        ({"threads": 10**5000}, "threads is a int that cannot be written"),
        ({"seed": "x"}, "seed is 'x'; expected a whole number"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"device": None}, "device is None; expected 'auto'"),
        ({"device": 3}, "device is 3; expected 'auto'"),
        ({"device": ["cpu"]}, r"device is \['cpu'\]; expected 'auto'"),
        ({"device": "cuda:" + "9" * 40}, "device is 'cuda:999"),
        ({"dtype": None}, "dtype is None"),
        ({"dtype": ["float32"]}, r"dtype is \['float32'\]"),
        ({"tokenizer": "x"}, "tokenizer is of type str; expected a Tokenizer or None"),
    ],
)
def test_bad_places_to_run(keywords, message):
    with pytest.raises(RequestError, match=message):
        Model.from_config(TINY, **keywords)


@pytest.mark.parametrize("named", ["int8", 5, "float64", ["bfloat16"]], ids=str)
def test_a_dtype_that_we_do_not_compute_in(named, tmp_path):
    """The checkpoint's dtype matters only to dtype="auto"."""
    save_checkpoint(tiny_model(), tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text()) | {"torch_dtype": named}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(
        ConfigError, match=r"config\.json: dtype is .*; expected 'bfloat16', 'float16', 'float32', or one of"
    ):
        Model.from_pretrained(tmp_path, device="cpu")
    assert Model.from_pretrained(tmp_path, device="cpu", dtype="float16").dtype == torch.float16


def test_weights_of_float32_without_a_word_on_it_stay_what_they_are(tmp_path):
    saved = tiny_model()
    save_checkpoint(saved, tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    del fields["torch_dtype"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    loaded = Model.from_pretrained(tmp_path, device="cpu")
    for (name, theirs), (_, ours) in zip(
        saved.module.named_parameters(), loaded.module.named_parameters(), strict=True
    ):
        assert torch.equal(theirs, ours), name


def test_a_text_is_scored_and_completed_from_its_beginning():
    """One tokenizer puts <|im_start|> before a text; the messages of a chat begin as their template says."""
    library = byte_library()
    library.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 257)]
    )
    plain = tiny_model(tokenizer=byte_tokenizer(TINY.vocab_size))
    template = ChatTemplate.from_gguf({"tokenizer.chat_template": CHAT_TEMPLATE}, {}, "toy")
    model = tiny_model(tokenizer=Tokenizer(library, "toy", TINY.vocab_size, chat_template=template))
    ids = [257, *plain.tokenizer.encode("ab")]
    assert model.score("ab") == plain.score(ids) != plain.score("ab")
    expected = plain.generate(ids, max_tokens=6)
    assert model.generate("ab", max_tokens=6) == expected
    assert model.generate(["ab"], max_tokens=6)[0] == expected
    with model.stream("ab", max_tokens=6) as stream:
        assert "".join(stream) == expected.text
    assert model.generate(ids, max_tokens=6) == expected  # ids are taken as they are
    chat = [{"role": "user", "content": "ab"}]
    assert model.chat(chat, max_tokens=6) == plain.chat(chat, max_tokens=6)
    assert model.generate(model.tokenizer.render_chat(chat), max_tokens=6) == plain.chat(chat, max_tokens=6)
    assert model.generate("", max_tokens=2).num_prompt_tokens == 1


@pytest.mark.parametrize("config", [None, 3, {}, b"qwen2.5-3b"])
def test_what_is_no_config(config):
    with pytest.raises(RequestError, match=r"config is of type .*; expected a Config or a name"):
        Model.from_config(config)


def test_a_chunk_may_be_larger_than_any_prompt():
    small, large = (tiny_model(prefill_chunk=chunk) for chunk in (np.int64(512), 10**30))
    assert large.generate([1, 2, 3], max_tokens=4) == small.generate([1, 2, 3], max_tokens=4)


def test_every_error_is_an_error_of_ours():
    for error in (qwenkern.CheckpointError, qwenkern.ConfigError, qwenkern.RequestError):
        assert issubclass(error, qwenkern.Error)


def test_the_reference_agrees(model):
    ids = torch.arange(30)
    with torch.no_grad():
        assert torch.equal(model.forward(ids).argmax(-1), reference_model(model)(ids[None]).logits[0].argmax(-1))


def test_importing_prints_nothing():
    done = subprocess.run([sys.executable, "-c", "import qwenkern.Model"], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16, torch.float64])
def test_torchs_defaults_change_nothing(default):
    """Programs set a default dtype or device to load another model."""
    how = {"max_tokens": 20, "temperature": 0.8, "top_p": 0.9, "seed": 3, "logit_bias": {3: 0.3}}
    ids = list(range(50))

    def results(model):
        return model.generate([1, 2, 3], **how).token_ids, model.score(ids).perplexity, model.forward(ids).tolist()

    expected = results(Model.from_config(TINY, device="cpu", dtype="float32"))
    torch.set_default_dtype(default)
    try:
        with torch.device("meta"):
            found = results(Model.from_config(TINY, device="cpu", dtype="float32"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert found == expected


def test_a_vocabulary_smaller_than_what_is_asked_of_it():
    model = Model.from_config(replace(TINY, vocab_size=8), device="cpu", dtype="float32")
    completion = model.generate([1, 2], max_tokens=2, logprobs=100, temperature=1.0, top_k=10**400)
    assert [len(token.top) for token in completion.logprobs] == [8, 8]
