"""Models with quantised weights: the result of quantize=, and computations with exactly these weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.models import TINY, save_checkpoint, tiny_model
from support.tolerances import MEAN_KL_PLANES, divergences

from qwenkern import Model, RequestError
from qwenkern.conversion import CHOICES
from qwenkern.kernels.weights import FORMATS, Dense

CONFIG = replace(
    TINY, vocab_size=512, hidden_size=256, intermediate_size=256, num_attention_heads=8, tie_word_embeddings=True
)
PROMPT = [7, 3, 300, 41]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("dense")
    save_checkpoint(tiny_model(CONFIG, torch.bfloat16), path)
    return path


def load(path: Path, **keywords) -> Model:
    return Model.from_pretrained(path, device="cpu", cache_tokens=512, **keywords)


def dequantised(model: Model) -> Model:
    """The dense model in float32 with the values of its weights."""
    dense = Model.from_config(replace(model.config, dtype="float32"), device="cpu", cache_tokens=512)
    state = {
        name: tensor for name, tensor in model.module.state_dict().items() if name.endswith(("norm.weight", "bias"))
    }
    dense.module.load_state_dict(state, strict=False)
    for name, linear in model.module.linears().items():
        dense.module.get_submodule(name).value.copy_(linear.value.dequantise())
    return dense


def formats(model: Model) -> set[str]:
    return {linear.format for linear in model.module.linears().values()}


@pytest.mark.parametrize("quantize", CHOICES)
def test_a_checkpoint_is_quantised_as_it_loads(quantize, folder):
    model = load(folder, quantize=quantize)
    assert model.dtype == torch.float32
    ends = "int8" if quantize == "int4" else quantize
    for name, linear in model.module.linears().items():
        assert linear.format == (ends if name in ("model.embed_tokens", "lm_head") else quantize), name
    assert model.module.lm_head is model.module.model.embed_tokens
    dense = dequantised(model)
    assert divergences(dense.forward(PROMPT).double(), model.forward(PROMPT)).mean() <= MEAN_KL_PLANES
    original = load(folder, dtype="float32").forward(PROMPT).double()
    assert divergences(original, model.forward(PROMPT)).mean() <= {"int4": 1.0}.get(quantize, 0.03)
    expected = dense.generate(PROMPT, max_tokens=8, temperature=0)
    assert model.generate(PROMPT, max_tokens=8, temperature=0).token_ids == expected.token_ids


@pytest.mark.parametrize("quantize", [None, "none", "int4"])
def test_progress_counts_the_bytes_of_the_checkpoint(quantize, folder):
    calls = []
    load(folder, quantize=quantize, progress=lambda *said: calls.append(said))
    tasks, done, totals = zip(*calls, strict=True)
    assert set(tasks) == {"load"}
    assert list(done) == sorted(done)
    assert done[-1] == totals[0] == totals[-1] > 0


def test_the_dtype_is_that_of_activations(folder):
    model = load(folder, quantize="int8", dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert model.module.model.embed_tokens.value.dtype == torch.bfloat16
    assert model.forward(PROMPT).isfinite().all()


def test_none_changes_nothing_of_a_dense_checkpoint(folder):
    for quantize in (None, "none"):
        model = load(folder, quantize=quantize)
        assert (formats(model), model.dtype) == ({"dense"}, torch.bfloat16)


def test_random_weights_are_quantised(folder):
    model = Model.from_config(CONFIG, device="cpu", quantize="int4", cache_tokens=512)
    assert formats(model) == {"int4", "int8"}
    assert model.forward(PROMPT).isfinite().all()
    dense = Model.from_config(CONFIG, device="cpu", dtype="float32", cache_tokens=512)
    error = model.module.model.layers[1].mlp.down_proj.value.dequantise()
    error -= dense.module.model.layers[1].mlp.down_proj.value.dequantise()
    assert 0 < error.std() < 0.003  # of weights with a standard deviation of 0.02


def test_a_matrix_of_another_size_stays_dense(tmp_path, caplog):
    config = replace(CONFIG, vocab_size=503)
    save_checkpoint(tiny_model(config, torch.bfloat16), tmp_path)
    model = load(tmp_path, quantize="int8")
    assert isinstance(model.module.lm_head.value, Dense)
    assert formats(model) == {"dense", "int8"}
    assert "1 matrices (such as model.embed_tokens.weight) stay dense, because int8 does not support" in caplog.text


@pytest.mark.parametrize("quantize", ["int5", "q4_0", 4, True, ["int4"]])
def test_another_value_is_refused(quantize, folder):
    with pytest.raises(RequestError, match=r"quantize is .*; expected None or one of 'int8', 'int4'"):
        load(folder, quantize=quantize)
    assert set(CHOICES) <= set(FORMATS)
