"""The module graph against transformers' Qwen2 with the same weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.models import TINY, reference_model, tiny_model
from support.tolerances import YARN_RELATIVE, assert_as_close_as
from transformers import Qwen2Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qwenkern import RequestError, YarnScaling
from qwenkern.rope import inverse_frequencies

SHAPES = {
    "tied": replace(TINY, tie_word_embeddings=True),
    "multi-query": replace(TINY, num_key_value_heads=1, num_hidden_layers=1),
    "multi-head": replace(TINY, num_key_value_heads=4, num_hidden_layers=4),
    "head 64, 7 to 1": replace(TINY, head_dim=64, num_attention_heads=7, num_key_value_heads=1, hidden_size=448),
    "head 128, 8 to 1": replace(TINY, head_dim=128, num_attention_heads=8, num_key_value_heads=1, num_hidden_layers=3),
    "odd FFN": replace(TINY, intermediate_size=77, vocab_size=301, tie_word_embeddings=True),
    "other eps and theta": replace(TINY, rms_norm_eps=1e-5, rope_theta=10000.0),
    "yarn": replace(TINY, max_position_embeddings=64, rope_scaling=YarnScaling(4.0, 64)),
}


@pytest.mark.processor
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())
def test_logits_are_as_close_to_float64_as_those_of_transformers(config, dtype):
    model = tiny_model(config, dtype)
    ids = torch.randint(config.vocab_size, (2, 150), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        truth = _in_float64(model)(ids).logits
        peer = reference_model(model)(ids).logits
    assert_as_close_as(model.forward(ids).to(dtype), peer, truth)


def test_a_changed_weight_changes_the_logits():
    """The comparison above would notice."""
    model, ids = tiny_model(), torch.arange(40)
    before = model.forward(ids)
    theirs = reference_model(tiny_model())
    with torch.no_grad():
        model.module.model.layers[1].self_attn.qkv_proj.bias[-1] += 0.5
        truth = _in_float64(tiny_model())(ids[None]).logits[0]
        peer = theirs(ids[None]).logits[0]
    assert_as_close_as(before, peer, truth)
    with pytest.raises(AssertionError, match="error"):
        assert_as_close_as(model.forward(ids), peer, truth)


@pytest.mark.parametrize(
    ("factor", "original", "theta", "head_dim"),
    [(4.0, 32768, 1e6, 128), (2.0, 32768, 1e6, 64), (8.0, 4096, 1e4, 128), (1.0, 32768, 1e6, 128), (3.7, 100, 1e5, 80)],
)
def test_yarn_frequencies_equal_those_of_transformers(factor, original, theta, head_dim):
    scaling = YarnScaling(factor, original)
    config = replace(TINY, rope_scaling=scaling, rope_theta=theta, head_dim=head_dim)
    rope = {"rope_type": "yarn", "rope_theta": theta, "factor": factor, "original_max_position_embeddings": original}
    expected, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](Qwen2Config(head_dim=head_dim, rope_parameters=rope))
    torch.testing.assert_close(inverse_frequencies(config), expected, rtol=YARN_RELATIVE, atol=0)
    assert scaling.attention_scale == pytest.approx(attention_factor, rel=1e-12)


def test_tied_embeddings_are_one_tensor():
    model = tiny_model(replace(TINY, tie_word_embeddings=True))
    assert model.module.lm_head.weight.data_ptr() == model.module.model.embed_tokens.weight.data_ptr()
    assert sum(p.numel() for p in model.module.parameters()) == model.config.num_parameters


@pytest.mark.parametrize("hidden", [1 << 23, 1 << 24])
def test_weights_that_no_memory_holds(hidden):
    config = replace(TINY, vocab_size=1 << 24, hidden_size=hidden)
    with pytest.raises(RequestError, match=r"does not fit on cpu: weights \d+\.\d+ GB"):
        tiny_model(config)


ON_KERNELS = {
    "head 64, 7 to 1": replace(TINY, head_dim=64, num_attention_heads=7, num_key_value_heads=1),
    "head 128, 8 to 1": replace(TINY, head_dim=128, num_attention_heads=8, num_key_value_heads=1, num_hidden_layers=1),
}
ON_KERNELS = {name: replace(config, hidden_size=64, vocab_size=97) for name, config in ON_KERNELS.items()}


@pytest.mark.slow
@pytest.mark.parametrize("config", ON_KERNELS.values(), ids=ON_KERNELS.keys())
def test_kernels_and_reference_write_the_same_text(monkeypatch, device, config):
    """A ragged batch: prefill of many and of few tokens, then two decode steps, into a page's last place, a new page's
    first, and its second."""
    model = tiny_model(config, device=device)
    prompts = [[(7 * at + length) % 97 for at in range(length)] for length in (1, 5, 63, 64)]
    monkeypatch.setenv("QWENKERN_KERNELS", "reference")
    expected = [each.token_ids for each in model.generate(prompts, max_tokens=3)]
    monkeypatch.setenv("QWENKERN_KERNELS", "triton")
    model._runner = None
    assert [each.token_ids for each in model.generate(prompts, max_tokens=3)] == expected
    assert model.generate(prompts[1], max_tokens=2).token_ids == expected[1][:2]


@pytest.mark.parametrize("num_tokens", [9, 70])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("config", ON_KERNELS.values(), ids=ON_KERNELS.keys())
def test_logits_on_the_kernels(ops, device, config, dtype, num_tokens):
    model = tiny_model(config, dtype, device=device)
    ids = torch.randint(97, (1, num_tokens), generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad():
        truth = _in_float64(model)(ids).logits
        peer = reference_model(model)(ids).logits
    assert_as_close_as(model.forward(ids).to(dtype), peer, truth)


def _in_float64(model):
    """transformers in float64; its rotary embedding and norms stay in float32, as they do in every dtype of it."""
    return reference_model(model, torch.float64)
