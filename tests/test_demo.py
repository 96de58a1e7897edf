"""The real demo model (Qwen2.5-Coder-0.5B-Instruct) against transformers on the same bfloat16 weights.

The truth is transformers in float32 on the weights rounded to bfloat16.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tolerances import MEAN_KL_FLOAT32, MEAN_KL_RATIO, NEAR_TIE, mean_kl
from twins import twin

from qwenkern import Model
from qwenkern.integrations import transformers as integration
from qwenkern.kernels import dispatch

pytestmark = [pytest.mark.demo, pytest.mark.timeout(1800), pytest.mark.xdist_group("demo")]

WINDOW = 512
NUM_WINDOWS = 4
PROMPTS = [
    "def quicksort(items):",
    "Write one sentence about the sea.",
    "用一句话介绍长城。",
    "Напиши короткое предложение о зиме.",
]


@pytest.fixture(scope="module")
def bfloat16(demo_path):
    return Model.from_pretrained(demo_path, device="cpu", dtype="bfloat16")


@pytest.fixture(scope="module")
def float32(bfloat16):
    """Ours in float32, on the weights of the bfloat16 model."""
    model = Model.from_config(bfloat16.config, device="cpu", dtype="float32", tokenizer=bfloat16.tokenizer)
    model.module.load_state_dict(bfloat16.module.state_dict())
    return model


@pytest.fixture(scope="module")
def theirs(bfloat16):
    return twin(bfloat16)


@pytest.fixture(scope="module")
def truth(float32):
    return twin(float32)


@pytest.fixture(scope="module")
def windows(bfloat16):
    """2,048 tokens of mixed text: every language and program of the collection has a share."""
    texts = [entry["text"] for entry in json.loads((Path(__file__).parent / "data" / "texts.json").read_text("utf-8"))]
    stride = 7  # visits all texts, in an order that mixes them
    order = [texts[n * stride % len(texts)] for n in range(len(texts))]
    ids = bfloat16.tokenizer.encode("\n".join(order))
    assert len(ids) >= WINDOW * NUM_WINDOWS
    return torch.tensor(ids[: WINDOW * NUM_WINDOWS]).reshape(NUM_WINDOWS, WINDOW)


@dataclass
class Agreement:
    kl: float
    top1: float


@pytest.fixture(scope="module")
def agreements(bfloat16, float32, theirs, truth, windows):
    """Each implementation's distance from the truth, teacher-forced over all windows."""
    sums = {name: Agreement(0.0, 0.0) for name in ("ours float32", "ours bfloat16", "theirs bfloat16")}
    with torch.no_grad():
        for ids in windows:
            expected = truth(ids[None]).logits[0]
            for name, logits in (
                ("ours float32", float32.forward(ids)),
                ("ours bfloat16", bfloat16.forward(ids)),
                ("theirs bfloat16", theirs(ids[None]).logits[0]),
            ):
                sums[name].kl += mean_kl(expected, logits) / NUM_WINDOWS
                sums[name].top1 += (expected.argmax(-1) == logits.argmax(-1)).double().mean().item() / NUM_WINDOWS
    for name, agreement in sums.items():
        print(f"{name}: mean KL {agreement.kl:.3e} nats, top-1 {agreement.top1:.4%}")
    return sums


def test_float32_is_transformers_float32(agreements):
    assert agreements["ours float32"].kl <= MEAN_KL_FLOAT32
    assert agreements["ours float32"].top1 == 1.0


def test_bfloat16_is_as_close_to_the_truth_as_transformers(agreements):
    ours, theirs = agreements["ours bfloat16"], agreements["theirs bfloat16"]
    assert 0 < ours.kl <= MEAN_KL_RATIO * theirs.kl
    assert ours.top1 >= theirs.top1


def _first_difference(ours, theirs):
    return next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)


def _margin(truth, ids, first, second):
    """How much likelier, in nats, the truth finds the first of two next tokens."""
    with torch.no_grad():
        logprobs = truth(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    return (logprobs[first] - logprobs[second]).abs().item()


def _greedy(model, ids, count):
    settings = {"max_new_tokens": count, "min_new_tokens": count, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        return model.generate(torch.tensor([ids]), do_sample=False, **settings)[0, len(ids) :].tolist()


def _assert_same_text(truth, dtype, ids, ours, theirs):
    """In float32. In bfloat16 texts may part where the truth finds the two tokens almost equally likely."""
    where = _first_difference(ours, theirs)
    if dtype == "float32":
        assert where is None
    elif where is not None:
        margin = _margin(truth, ids + ours[:where], ours[where], theirs[where])
        print(f"parts at token {where}, where the truth's margin is {margin:.4f} nats")
        assert margin < NEAR_TIE


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_greedy_text_of_transformers_with_our_pieces(request, monkeypatch, theirs, truth, dtype):
    """bfloat16 in C where a compiler is there; also the few tokens that are otherwise left to transformers."""
    monkeypatch.delenv("QWENKERN_KERNELS", raising=False)
    monkeypatch.setattr(integration, "FEW", 0)
    monkeypatch.setattr(integration, "INTERPRETED", False)
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    model, peer = request.getfixturevalue(dtype), truth if dtype == "float32" else theirs
    patched = integration.apply_qwenkern(twin(model))
    for prompt in PROMPTS[:2]:
        ids = model.tokenizer.encode(prompt)
        ours, out = _greedy(patched, ids, 32), _greedy(peer, ids, 32)
        _assert_same_text(truth, dtype, ids, ours, out)


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_greedy_text_is_that_of_transformers(request, truth, theirs, prompt, dtype):
    """64 tokens; where they part, the truth must find the two tokens almost equally likely."""
    model, peer = request.getfixturevalue(dtype), truth if dtype == "float32" else theirs
    ids = model.tokenizer.encode(prompt)
    ours = model.generate(ids, max_tokens=64, ignore_eos=True).token_ids
    out = _greedy(peer, ids, 64)
    _assert_same_text(truth, dtype, ids, ours, out)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_alone_in_a_batch_and_in_chunks(request, truth, dtype):
    """The same greedy tokens whichever way a sequence is run; in bfloat16 up to near-ties."""
    model = request.getfixturevalue(dtype)
    prompts = [model.tokenizer.encode(prompt) for prompt in (*PROMPTS, "a", "x" * 300, "The sun", "Гора " * 40)]
    alone = [model.generate(prompt, max_tokens=24, ignore_eos=True).token_ids for prompt in prompts]
    others = {"batch": [c.token_ids for c in model.generate(prompts, max_tokens=24, ignore_eos=True)]}
    usual = model.prefill_chunk
    try:
        for model.prefill_chunk in (1, 33):
            chunked = model.generate(prompts[5:], max_tokens=24, ignore_eos=True)
            others[f"chunk {model.prefill_chunk}"] = alone[:5] + [completion.token_ids for completion in chunked]
    finally:
        model.prefill_chunk = usual
    for name, tokens in others.items():
        for prompt, expected, found in zip(prompts, alone, tokens, strict=True):
            where = _first_difference(expected, found)
            if dtype == "float32":
                assert where is None, name
            elif where is not None:
                margin = _margin(truth, prompt + expected[:where], expected[where], found[where])
                print(f"{name}: parts at token {where}, margin {margin:.4f} nats")
                assert margin < NEAR_TIE, name


def test_it_writes_sense(bfloat16):
    answer = bfloat16.chat([{"role": "user", "content": "What is 12 + 30? Answer with the number only."}], max_tokens=8)
    assert answer.text.strip().rstrip(".") == "42"
    assert answer.finish_reason == "stop"
