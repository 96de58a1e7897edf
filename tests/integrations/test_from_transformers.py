"""A loaded model of transformers, used by qwenkern on the same memory."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import peft
import pytest
import torch
from support.models import TINY, reference_model, tiny_model
from support.toy_tokenizer import byte_library, byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from qwenkern import Config, ConfigError, Model, RequestError, YarnScaling
from qwenkern.allocation import allocate
from qwenkern.integrations.transformers import share as integration

SHAPES = {
    "plain": TINY,
    "tied": replace(TINY, tie_word_embeddings=True),
    "yarn": replace(TINY, max_position_embeddings=64, rope_scaling=YarnScaling(4.0, 64)),
}
PROMPTS = [[5, 9, 2, 7], [400] * 30, [1]]
pytestmark = pytest.mark.processor


def loaded(config: Config = TINY, dtype: torch.dtype = torch.float32) -> Qwen2ForCausalLM:
    """transformers' model with weights of its own."""
    model = copy.deepcopy(reference_model(tiny_model(config, dtype)))
    model.tie_weights()
    return model


@torch.no_grad()
def written(model: Qwen2ForCausalLM, prompt: list[int]) -> list[int]:
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(torch.tensor([prompt]), **settings)[0].tolist()[len(prompt) :]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())
def test_it_is_the_model_that_its_checkpoint_gives(tmp_path, config, dtype):
    theirs = loaded(config, dtype)
    theirs.save_pretrained(tmp_path)
    byte_library().save(str(tmp_path / "tokenizer.json"))
    from_disk = Model.from_pretrained(tmp_path, device="cpu")
    before = written(theirs, PROMPTS[1])
    ours = Model.from_transformers(theirs, cache_tokens=512)
    assert replace(ours.config, source="") == replace(from_disk.config, source="")
    assert (ours.dtype, ours.device) == (dtype, torch.device("cpu"))
    assert torch.equal(ours.cache.rope.cos_sin[:512], from_disk.cache.rope.cos_sin[:512])
    for (name, shared), (_, read) in zip(
        ours.module.named_parameters(), from_disk.module.named_parameters(), strict=True
    ):
        assert torch.equal(shared, read), name
    expected = from_disk.generate(PROMPTS, max_tokens=8, ignore_eos=True)
    assert [each.token_ids for each in ours.generate(PROMPTS, max_tokens=8, ignore_eos=True)] == [
        each.token_ids for each in expected
    ]
    assert written(theirs, PROMPTS[1]) == before
    if dtype == torch.float32:
        assert ours.generate(PROMPTS[1], max_tokens=8, ignore_eos=True).token_ids == before


@pytest.mark.parametrize("config", [SHAPES["plain"], SHAPES["tied"]], ids=["plain", "tied"])
def test_every_weight_is_shared(config):
    theirs = loaded(config)
    own = {name: parameter.data_ptr() for name, parameter in theirs.named_parameters()}
    identities = {name: id(parameter) for name, parameter in theirs.named_parameters()}
    values = {name: parameter.detach().clone() for name, parameter in theirs.named_parameters()}
    weights = dict(Model.from_transformers(theirs, cache_tokens=64).module.named_parameters())
    assert identities == {name: id(parameter) for name, parameter in theirs.named_parameters()}
    for name, parameter in theirs.named_parameters():
        assert torch.equal(parameter, values[name])
        packed = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
        packed |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
        part = name.split(".")[-2]
        ours = weights[name.replace(part, packed.get(part, part))]
        assert parameter.untyped_storage().data_ptr() == ours.untyped_storage().data_ptr()
        if part not in packed:
            assert parameter.data_ptr() == own[name]
    assert not any(parameter.is_meta or parameter.requires_grad for parameter in weights.values())


def test_a_change_to_one_is_a_change_to_both():
    theirs = loaded()
    ours = Model.from_transformers(theirs, cache_tokens=64)
    before = ours.forward([1, 2, 3])
    with torch.no_grad():
        for layer in theirs.model.layers:
            layer.self_attn.v_proj.weight.mul_(2)
        logits = theirs(torch.tensor([[1, 2, 3]])).logits[0]
    after = ours.forward([1, 2, 3])
    assert not torch.equal(after, before)
    assert after.argmax(-1).tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deep", "pickle"]
)
def test_a_copy_has_weights_of_its_own(copier):
    theirs = loaded()
    ours = Model.from_transformers(theirs, cache_tokens=64)
    before = ours.forward([1, 2, 3])
    for module in theirs.modules():
        vars(module).pop("_kernel_funcs", None)  # of `kernels`, which nothing pickles
    other = copier(theirs)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    assert torch.equal(ours.forward([1, 2, 3]), before)
    assert not torch.equal(Model.from_transformers(other, cache_tokens=64).forward([1, 2, 3]), before)
    assert torch.equal(ours.forward([1, 2, 3]), before)


def test_a_second_time_packs_nothing():
    theirs = loaded()
    first, second = (dict(Model.from_transformers(theirs, cache_tokens=64).module.named_parameters()) for _ in range(2))
    assert {name: weight.data_ptr() for name, weight in first.items()} == {
        name: weight.data_ptr() for name, weight in second.items()
    }


def test_one_packed_tensor_at_a_time_is_all_the_memory_it_takes(monkeypatch):
    """What a packed tensor replaces is free before the next one is made."""
    theirs, apart = loaded(), []

    def counted(shape, dtype, device):
        layers = theirs.model.layers
        parts = [(layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight) for layer in layers]
        parts += [(layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight) for layer in layers]
        if len(shape) > 1:
            apart.append(sum(a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr() for a, b in parts))
        return allocate(shape, dtype, device)

    monkeypatch.setattr(integration, "allocate", counted)
    integration.shared_module(theirs)
    assert apart == [4, 3, 2, 1]


def test_generation_defaults_and_tokenizer():
    theirs = loaded()
    theirs.generation_config.update(do_sample=True, temperature=0.5, top_k=7, eos_token_id=[3, 4], max_new_tokens=5)
    library = PreTrainedTokenizerFast(tokenizer_object=byte_library(), eos_token="<|im_end|>")
    library.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    ours = Model.from_transformers(theirs, library, cache_tokens=64, prefill_chunk=5, deterministic=True)
    assert ours.generation.sampling == {"temperature": 0.5, "top_k": 7}
    assert (ours.generation.end_ids, ours.generation.max_new_tokens) == ({3, 4}, 5)
    assert (ours.cache.num_tokens, ours.prefill_chunk, ours.deterministic) == (64, 5, True)
    toy = byte_tokenizer(TINY.vocab_size)
    assert ours.tokenizer.encode("wörld") == toy.encode("wörld")
    assert ours.tokenizer.vocab_size == TINY.vocab_size
    assert ours.tokenizer.encode_chat([{"role": "user", "content": "ab"}]) == toy.encode("ab")
    library.bos_token = "<|im_start|>"
    library.add_bos_token = True
    begun = Model.from_transformers(theirs, library, cache_tokens=64).score("ab").token_ids
    assert begun == library("ab")["input_ids"] == [257, *toy.encode("ab")]
    assert Model.from_transformers(theirs, toy, cache_tokens=64).tokenizer is toy
    assert Model.from_transformers(theirs, cache_tokens=64).tokenizer is None


def quantised(model):
    model.config.quantization_config = {"quant_method": "gptq"}


def mixed(model):
    model.model.norm.bfloat16()


def wide(model):
    model.double()


def half_loaded(model):
    model.model.layers[1].mlp.to("meta")


def slides(model):
    model.config.layer_types = ["sliding_attention"] * 2


def adapted(model):
    model.model.layers[0].mlp.extra = torch.nn.Linear(2, 2)


def reshaped(model):
    model.model.norm.weight = torch.nn.Parameter(torch.ones(64))


def turned(model):
    weight = model.lm_head.weight
    weight.data = weight.data.t().contiguous().t()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (quantised, RequestError, "the model is quantised; expected weights of bfloat16, float16 or float32"),
        (mixed, RequestError, r"model.norm.weight is bfloat16 on cpu, and model.embed_tokens.weight float32 on cpu"),
        (wide, RequestError, "is float64; expected bfloat16, float16 or float32"),
        (half_loaded, RequestError, r"layers.1.mlp.gate_proj.weight is on the device meta; expected"),
        (slides, ConfigError, r"sliding-window attention \(sliding_window None\), which is not supported"),
        (adapted, RequestError, "unknown tensor model.layers.0.mlp.extra.weight"),
        (reshaped, RequestError, r"model.norm.weight has shape \(64,\); expected \(128,\)"),
        (turned, RequestError, r"lm_head.weight has strides \[1, 503\]; expected contiguous rows"),
    ],
)
def test_what_cannot_be_shared_is_refused_and_left_alone(change, error, message):
    theirs = loaded()
    change(theirs)
    own = {name: parameter.data_ptr() for name, parameter in theirs.named_parameters()}
    with pytest.raises(error, match=message):
        Model.from_transformers(theirs)
    assert own == {name: parameter.data_ptr() for name, parameter in theirs.named_parameters()}


def test_other_objects_are_refused():
    small = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    with pytest.raises(RequestError, match="model is a LlamaForCausalLM; expected a Qwen2ForCausalLM of transformers"):
        Model.from_transformers(LlamaForCausalLM(LlamaConfig(**small, **heads)))
    with pytest.raises(RequestError, match="model is a str; expected a Qwen2ForCausalLM"):
        Model.from_transformers("Qwen/Qwen2.5-3B")
    theirs = Qwen2ForCausalLM(Qwen2Config(**small, **heads))
    adapted = peft.get_peft_model(theirs, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(RequestError, match=r"model is a PeftModel; expected .* the result of merge_and_unload\(\)"):
        Model.from_transformers(adapted)
    theirs = adapted.merge_and_unload()
    with pytest.raises(RequestError, match="tokenizer is a str; expected a fast tokenizer of transformers"):
        Model.from_transformers(theirs, "Qwen/Qwen2.5-3B")
    with pytest.raises(RequestError, match="cache_tokens is 0"):
        Model.from_transformers(theirs, cache_tokens=0)
