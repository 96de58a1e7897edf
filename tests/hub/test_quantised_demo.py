"""The demo's quantised file, run without conversion, against transformers in float32 on the dequantised weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.models import reference_model
from support.tolerances import MEAN_KL_QUANTISED, QUANTISED_TIE, divergences

from qwenkern import Model
from qwenkern.kernels.weights import Stack

pytestmark = [
    pytest.mark.demo,
    pytest.mark.slow,
    pytest.mark.processor,
    pytest.mark.timeout(1800),
    pytest.mark.xdist_group("demo"),
]
PROMPTS = ["def quicksort(items):", "Write one sentence about the sea.", "用一句话介绍长城。"]


@pytest.fixture(scope="module", autouse=True)
def as_for_anybody():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("QWENKERN_KERNELS", raising=False)
        patch.setattr("qwenkern.kernels.triton.backend.INTERPRETED", False)
        yield


@pytest.fixture(scope="module")
def model(demo_path):
    return Model.from_pretrained(demo_path, device="cpu", cache_tokens=1024)


@pytest.fixture(scope="module")
def truth(demo_path):
    return reference_model(Model.from_pretrained(demo_path, device="cpu", dtype="float32", quantize="none"))


def test_its_weights_stay_as_the_file_has_them(model, demo_path):
    assert model.dtype == torch.float32
    assert model.cache.pages[0].tensors[0].dtype == torch.float32
    found = set()
    for linear in model.module.linears().values():
        parts = linear.value.parts if isinstance(linear.value, Stack) else [linear.value]
        found |= {part.format for part in parts}
    assert found == {"q4_k", "q5_0", "q6_k", "q8_0"}
    weights = sum(parameter.nbytes for parameter in model.module.parameters())
    assert weights <= 1.03 * demo_path.stat().st_size


def test_it_is_as_exact_as_its_weights(model, truth):
    """Activations cost a thousandth of what 8-bit activations do."""
    entries = json.loads((Path(__file__).parents[1] / "data" / "texts.json").read_text("utf-8"))
    ids = [token for each in entries[:32] for token in model.tokenizer.encode(each["text"] + "\n")[:16]]
    with torch.no_grad():
        expected = truth(torch.tensor([ids])).logits[0]
    found = divergences(expected, model.forward(ids))
    print(f"mean KL {found.mean():.2e} nats of {len(ids)} tokens, at most {found.max():.2e}")
    assert 0 < found.mean() <= MEAN_KL_QUANTISED


@pytest.mark.parametrize("prompt", PROMPTS)
def test_its_greedy_text_is_that_of_the_dequantised_weights(model, truth, prompt):
    """transformers takes the same token after every token of the text, or one that it finds hardly likelier."""
    ids = model.tokenizer.encode(prompt)
    text = model.generate(ids, max_tokens=48, temperature=0, ignore_eos=True).token_ids
    with torch.no_grad():
        rows = truth(torch.tensor([ids + text])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
    lost = rows.amax(-1) - rows.gather(1, torch.tensor(text)[:, None])[:, 0]
    assert lost.max() <= QUANTISED_TIE


def test_a_prompt_does_not_change_in_company(model):
    """The tokens of a batch are multiplied by one kernel, however many they are."""
    ids = [model.tokenizer.encode(prompt) for prompt in PROMPTS]
    alone = [model.generate(each, max_tokens=16, temperature=0, ignore_eos=True).token_ids for each in ids]
    together = model.generate(ids, max_tokens=16, temperature=0, ignore_eos=True)
    assert [each.token_ids for each in together] == alone
