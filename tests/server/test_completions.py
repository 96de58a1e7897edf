"""/v1/completions: its answers, and the log-probabilities of its prompts, are those of a direct call of the model."""

from __future__ import annotations

import json

import httpx
import pytest
import torch
from support.engines import check_pages
from support.models import tiny_model
from support.servers import serving, toy

from qwenkern import Model
from qwenkern.server import answering

PROMPTS = ["Hello, w", [72, 101, 108, 108, 111, 44]]


@pytest.fixture(scope="module")
def model():
    with toy() as model:
        yield model


@pytest.fixture(scope="module")
def post(model):
    with serving(model) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield lambda **body: client.post("/v1/completions", json=body)


def streamed(response: httpx.Response) -> list[dict]:
    events = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_text_and_token_ids_are_continued(post, model, prompt):
    found = post(prompt=prompt, max_tokens=9).json()
    expected = model.generate(prompt, max_tokens=9)
    assert found["object"] == "text_completion"
    assert [choice["text"] for choice in found["choices"]] == [expected.text]
    assert found["usage"]["completion_tokens"] == expected.num_tokens
    check_pages(model)


def test_sixteen_tokens_are_the_default(post):
    assert post(prompt="Hello").json()["usage"]["completion_tokens"] == 16


def test_a_list_of_prompts_has_n_answers_for_each(post, model):
    params = {"max_tokens": 6, "n": 2, "temperature": 1.0, "seed": 3}
    found = post(prompt=["abc", "xyz"], **params).json()
    expected = model.generate(["abc", "xyz"], **params)
    assert [choice["text"] for choice in found["choices"]] == [each.text for each in expected]
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2, 3]
    assert found["usage"]["prompt_tokens"] == 6


def test_a_list_of_lists_of_ids_is_a_list_of_prompts(post, model):
    found = post(prompt=[[1, 2, 3], [4, 5]], max_tokens=4).json()
    assert [choice["text"] for choice in found["choices"]] == [
        each.text for each in model.generate([[1, 2, 3], [4, 5]], max_tokens=4)
    ]


@pytest.mark.parametrize("max_tokens", [0, 3])
def test_an_echoed_prompt_is_scored(post, model, max_tokens):
    """The reference is a log-softmax of the logits of all positions, in float64."""
    ids = PROMPTS[1]
    found = post(prompt=ids, echo=True, logprobs=2, max_tokens=max_tokens).json()["choices"][0]
    logprobs = found["logprobs"]
    expected = model.forward(ids).double().log_softmax(-1)
    own = model.generate(ids, max_tokens=max_tokens).text if max_tokens else ""
    assert found["text"] == model.tokenizer.decode(ids) + own
    assert logprobs["token_logprobs"][0] is None
    assert len(logprobs["tokens"]) == len(ids) + max_tokens
    for position, token in enumerate(ids[1:]):
        assert logprobs["token_logprobs"][position + 1] == pytest.approx(expected[position, token].item(), abs=1e-4)
        best = max(logprobs["top_logprobs"][position + 1].values())
        assert best == pytest.approx(expected[position].max().item(), abs=1e-4)
    assert logprobs["text_offset"][: len(ids)] == list(range(len(ids)))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["a<|im_start|>b", [64, 257, 65]])
def test_offsets_of_an_echo_are_those_of_its_text(post, prompt, stream):
    """The text of an echo has the special tokens of the prompt."""
    answer = post(prompt=prompt, echo=True, logprobs=0, max_tokens=3, logit_bias={"66": 100}, stream=stream)
    choices = [each["choices"][0] for each in (streamed(answer) if stream else [answer.json()])]
    assert "".join(choice["text"] for choice in choices) == "a<|im_start|>bccc"
    places = [choice["logprobs"]["text_offset"] for choice in choices if choice["logprobs"]]
    assert [place for each in places for place in each] == [0, 1, 13, 14, 15, 16]


def test_a_long_prompt_is_scored_in_several_passes(post, model):
    ids = torch.randint(0, 256, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    found = post(prompt=ids, echo=True, logprobs=1, max_tokens=1).json()["choices"][0]["logprobs"]
    expected = model.score(ids).logprobs
    assert found["token_logprobs"][1:-1] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("options", [{}, {"logprobs": 1}, {"echo": True}, {"echo": True, "logprobs": 1}])
@pytest.mark.parametrize("max_tokens", [0, 5])
def test_a_stream_has_the_same_answer(post, options, max_tokens):
    if not max_tokens and "echo" not in options:
        assert post(prompt="Hey", max_tokens=0, **options).status_code == 400
        return
    whole = post(prompt=["Hey", "You"], max_tokens=max_tokens, **options).json()
    chunks = streamed(
        post(
            prompt=["Hey", "You"], max_tokens=max_tokens, stream=True, stream_options={"include_usage": True}, **options
        )
    )
    assert chunks[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    for index, choice in enumerate(whole["choices"]):
        own = [each for chunk in chunks[:-1] for each in chunk["choices"] if each["index"] == index]
        assert "".join(each["text"] for each in own) == choice["text"]
        assert [each["finish_reason"] for each in own if each["finish_reason"]] == [choice["finish_reason"]]
        if "logprobs" in options:
            tokens = [token for each in own if each["logprobs"] for token in each["logprobs"]["tokens"]]
            assert tokens == choice["logprobs"]["tokens"]
            offsets = [offset for each in own if each["logprobs"] for offset in each["logprobs"]["text_offset"]]
            assert offsets == choice["logprobs"]["text_offset"]


def test_a_suffix_needs_the_tokens_of_coder(post):
    answer = post(prompt="def f():", suffix="return x")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "suffix"


@pytest.mark.demo
def test_code_is_filled_in(demo_path):
    """The prompt has the format that Qwen2.5-Coder's page gives for fill-in-the-middle."""
    before, after = "def add(a, b):\n    return ", "\n\nassert add(1, 2) == 3\n"
    with Model.from_pretrained("demo", cache_tokens=512) as model, serving(model) as url:
        answer = httpx.post(
            f"{url}/v1/completions", json={"prompt": before, "suffix": after, "max_tokens": 4}, timeout=60
        ).json()
        expected = model.generate(f"<|fim_prefix|>{before}<|fim_suffix|>{after}<|fim_middle|>", max_tokens=4)
    assert answer["choices"][0]["text"] == expected.text
    assert expected.text.startswith("a + b")


@pytest.mark.parametrize(("body", "param"), [
    ({"prompt": []}, "prompt"), ({"prompt": ["a"] * 257}, "prompt"), ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": "a", "best_of": 3}, "best_of"), ({"prompt": "a", "logprobs": 21}, "logprobs"),
    ({"prompt": "a", "n": 65}, "n"), ({"prompt": ["a"] * 100, "n": 10}, "n"), ({}, "prompt"),
    ({"prompt": "a", "suffix": "b", "echo": True}, "suffix"), ({"prompt": "a", "max_tokens": -1}, "max_tokens"),
])  # fmt: skip
def test_what_is_wrong_is_named(post, body, param):
    answer = post(**body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_token_ids_come_back_if_asked_for(post, model):
    expected = model.generate("Hello", max_tokens=7).token_ids
    assert post(prompt="Hello", max_tokens=7, return_token_ids=True).json()["choices"][0]["token_ids"] == expected
    chunks = streamed(post(prompt="Hello", max_tokens=7, return_token_ids=True, stream=True))
    assert [token for chunk in chunks for token in chunk["choices"][0]["token_ids"]] == expected
    assert "token_ids" not in post(prompt="Hello", max_tokens=7).json()["choices"][0]


def test_without_a_tokenizer_each_token_id_is_streamed_when_it_comes(monkeypatch):
    monkeypatch.setattr(answering, "_joined", list)  # no event of several tokens, however busy the machine is
    body = {"prompt": [5, 6, 7], "max_tokens": 60, "ignore_eos": True, "return_token_ids": True, "stream": True}
    with tiny_model() as model, serving(model) as url, httpx.Client(base_url=url, timeout=60) as client:
        expected = model.generate([5, 6, 7], max_tokens=60, ignore_eos=True).token_ids
        with client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            first = json.loads(next(lines).removeprefix("data: "))["choices"][0]
            assert 0 < len(first["token_ids"]) < 60
            rest = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    ids = first["token_ids"] + [token for chunk in rest for token in chunk["choices"][0]["token_ids"]]
    assert ids == expected
