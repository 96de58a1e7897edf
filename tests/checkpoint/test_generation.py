"""A checkpoint's settings for generation: they are checked, and are the same for both formats and for transformers."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import save_checkpoint, tiny_model, unpacked
from support.toy_tokenizer import CHAT_TEMPLATE
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers
from transformers import GenerationConfig, Qwen2ForCausalLM

from qwenkern import CheckpointError, Config, ConfigError, Model, RequestError, SamplingParams
from qwenkern import generation as room
from qwenkern.checkpoint import open_checkpoint
from qwenkern.generation import Generation

pytest.importorskip("gguf")
from gguf import GGMLQuantizationType, GGUFWriter

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|bos|>", "<|turn_over|>"]
TEXT = ["<tool_call>", "<|fim_prefix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"]
TOKENS = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "</s>", *SPECIAL, *TEXT]
IDS = {token: n for n, token in enumerate(TOKENS)}
USUAL = {IDS[token] for token in ("<|im_end|>", "<|endoftext|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>")}
SMALL = Config(
    vocab_size=288,  # more than there are tokens, as Qwen has it
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    max_position_embeddings=128,
)
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.0.input_layernorm": "blk.0.attn_norm",
    "model.layers.0.self_attn.q_proj": "blk.0.attn_q",
    "model.layers.0.self_attn.k_proj": "blk.0.attn_k",
    "model.layers.0.self_attn.v_proj": "blk.0.attn_v",
    "model.layers.0.self_attn.o_proj": "blk.0.attn_output",
    "model.layers.0.post_attention_layernorm": "blk.0.ffn_norm",
    "model.layers.0.mlp.gate_proj": "blk.0.ffn_gate",
    "model.layers.0.mlp.up_proj": "blk.0.ffn_up",
    "model.layers.0.mlp.down_proj": "blk.0.ffn_down",
}


@pytest.fixture(scope="module")
def original():
    return tiny_model(SMALL)


def folder(original: Model, path: Path, **files: dict[str, Any]) -> Path:
    """A Hugging Face folder. files: what generation_config.json holds, and what config.json and tokenizer_config.json
    hold besides the usual."""
    save_checkpoint(original, path)
    library = Library(models.BPE(vocab={token: IDS[token] for token in TOKENS[:258]}, merges=[("h", "e")]))
    library.normalizer = normalizers.NFC()
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(SPECIAL)
    library.add_tokens(TEXT)
    library.save(str(path / "tokenizer.json"))
    for name in ("config", "tokenizer_config"):
        file = path / f"{name}.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | files.get(name, {})))
    if "generation_config" in files:
        (path / "generation_config.json").write_text(json.dumps(files["generation_config"]))
    return path


def gguf(original: Model, path: Path, **metadata: Any) -> Path:
    """The same model as llama.cpp's converter has it; metadata: further keys of tokenizer.ggml."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(path, "qwen2")
    numbers = {
        "block_count": 1,
        "context_length": 128,
        "embedding_length": 32,
        "feed_forward_length": 48,
        "attention.head_count": 2,
        "attention.head_count_kv": 1,
    }
    for key, value in numbers.items():
        writer.add_uint32(f"qwen2.{key}", value)
    writer.add_float32("qwen2.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_float32("qwen2.rope.freq_base", 1e6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    unused = [f"[PAD{n}]" for n in range(len(TOKENS), SMALL.vocab_size)]
    writer.add_token_list([*TOKENS, *unused])
    writer.add_token_types([1] * 258 + [3] * len(SPECIAL) + [4] + [3] * (len(TEXT) - 1) + [5] * len(unused))
    writer.add_token_merges(["h e"])
    writer.add_chat_template(metadata.pop("chat_template", CHAT_TEMPLATE))
    for key, value in metadata.items():
        {bool: writer.add_bool, int: writer.add_uint32}[type(value)](f"tokenizer.ggml.{key}", value)
    for name, tensor in unpacked(original).items():
        stem, kind = name.rsplit(".", 1)
        writer.add_tensor(f"{NAMES[stem]}.{kind}", tensor.contiguous().numpy(), raw_dtype=GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def load(path: Path, **keywords: Any) -> Model:
    return Model.from_pretrained(path, device="cpu", dtype="float32", cache_tokens=256, **keywords)


def ends(model: Model, prompt: Any = "a", tokens: Any = range(SMALL.vocab_size), **keywords: Any) -> set[int]:
    """The ids that end a text, found by forcing each id."""
    prompts = [prompt] * len(tokens)
    found = {}
    for token, each in zip(tokens, prompts, strict=True):
        found[token] = model.generate(each, max_tokens=2, logit_bias={token: 1000.0}, **keywords).finish_reason
    return {token for token, reason in found.items() if reason == "stop"}


# Ends

NOTHING = SamplingParams()

CHAT = [{"role": "user", "content": "a"}]
TOLD = sorted(USUAL | {5, 9, *range(256, SMALL.vocab_size)})


@pytest.mark.parametrize("prompt", ["a", CHAT, [5]], ids=["text", "chat", "ids"])
def test_a_folder_and_a_gguf_of_one_model_end_alike(original, prompt, tmp_path):
    """A tuned base model: its generation_config names only <|endoftext|>, its GGUF only <|im_end|>."""
    files = {"generation_config": {"eos_token_id": IDS["<|endoftext|>"]}, "config": {"eos_token_id": [5, 256]}}
    ours = load(folder(original, tmp_path / "folder", **files))
    assert ends(ours, prompt, TOLD) == USUAL | {5, 256}
    assert ends(ours, prompt, TOLD, ignore_eos=True) == set()
    assert ends(ours, prompt, TOLD, ignore_eos=True, stop_token_ids=[9]) == {9}
    theirs = load(gguf(original, tmp_path / "one.gguf", eos_token_id=5, eot_token_id=256))
    assert ends(theirs, prompt, TOLD) == USUAL | {5, 256}
    assert load(gguf(original, tmp_path / "none.gguf"))._requests([[5]], NOTHING)[0].end_ids == USUAL


def test_all_that_name_an_end_are_united(original, tmp_path):
    files = {
        "generation_config": {"eos_token_id": 7},
        "config": {"eos_token_id": [8]},
        "tokenizer_config": {"eos_token": {"content": "<|bos|>"}},
    }
    [request] = load(folder(original, tmp_path / "folder", **files))._requests([[5]], NOTHING)
    assert request.end_ids == USUAL | {7, 8, IDS["<|bos|>"]}
    keys = {f"{name}_token_id": n for n, name in enumerate(["eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep"], 10)}
    [request] = load(gguf(original, tmp_path / "all.gguf", **keys))._requests([[5]], NOTHING)
    assert request.end_ids == USUAL | set(range(10, 16))


@pytest.mark.parametrize(
    "files", [{"eos_token_id": [5, 256]}, {"eos_token_id": 9}, {"eos_token_id": None}, {}], ids=str
)
def test_config_json_counts_without_a_generation_config(original, files, tmp_path):
    folder(original, tmp_path, config=files)
    theirs = Qwen2ForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id
    theirs = {theirs} if isinstance(theirs, int) else set(theirs or [])
    assert open_checkpoint(tmp_path).generation.end_ids == theirs


OTHER_TEMPLATE = CHAT_TEMPLATE.replace("<|im_end|>", "<|turn_over|>")


def test_the_end_of_turn_of_a_template_that_wants_a_system_message(original, tmp_path):
    template = "{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}" + OTHER_TEMPLATE
    model = load(folder(original, tmp_path, tokenizer_config={"chat_template": template}))
    assert model.tokenizer.end_of_turn_ids == {IDS["<|turn_over|>"]}


@pytest.mark.parametrize("form", ["folder", "gguf"])
def test_a_chat_ends_at_the_templates_end_of_turn(original, form, tmp_path):
    if form == "folder":
        model = load(folder(original, tmp_path, tokenizer_config={"chat_template": OTHER_TEMPLATE}))
    else:
        model = load(gguf(original, tmp_path / "m.gguf", chat_template=OTHER_TEMPLATE))
    over = IDS["<|turn_over|>"]
    how = {"logit_bias": {over: 1000.0}, "max_tokens": 2}
    assert model.generate("a", **how).finish_reason == "length"
    for answer in (
        model.chat(CHAT, **how),
        model.generate(CHAT, **how),
        model.generate(["a", CHAT], **how)[1],
        model.chat(CHAT, **how, n=2)[1],
    ):
        assert (answer.finish_reason, answer.stop_reason, answer.text) == ("stop", over, "")
    with model.stream(CHAT, **how) as stream:
        assert list(stream) == []
        assert stream.completion.stop_reason == over
    assert model.chat(CHAT, **how, ignore_eos=True).finish_reason == "length"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",  # no token after an answer
        "{{ raise_exception('no') }}",
        "{% for m in messages %}<|im_start|>{{ m.role }}{% endfor %}",  # no answer
    ],
)
def test_a_template_without_an_end_of_turn_adds_none(original, template, tmp_path):
    model = load(folder(original, tmp_path, tokenizer_config={"chat_template": template}))
    assert model.tokenizer.end_of_turn_ids == frozenset()
    assert model._prompts._end_ids(NOTHING, is_chat=True) == USUAL


# Impossible values


WRONG_IDS = ["<|im_end|>", [[5]], [5, None], 288, [5, 288], -1, [-1], 5.0, True, {"id": 5}, 10**400, "", ["5"]]


@pytest.mark.parametrize("file", ["generation_config", "config"])
@pytest.mark.parametrize("value", WRONG_IDS, ids=lambda value: repr(value)[:20])
def test_eos_token_id_that_is_none(original, file, value, tmp_path):
    folder(original, tmp_path, **{file: {"eos_token_id": value}})
    with pytest.raises(ConfigError, match=rf"[/\\]{file}\.json: eos_token_id is .*; expected a token id below 288"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("key", room._END_KEYS)
def test_a_gguf_whose_end_is_beyond_the_logits(original, key, tmp_path):
    path = gguf(original, tmp_path / "m.gguf", **{key.removeprefix("tokenizer.ggml."): 288})
    with pytest.raises(ConfigError, match=rf"m\.gguf: {re.escape(key)} is 288; expected a token id below 288"):
        open_checkpoint(path)


@pytest.mark.parametrize("value", [5, ["<|im_end|>"], {"id": 3}, {"content": None}, True], ids=str)
def test_eos_token_that_is_no_text(original, value, tmp_path):
    folder(original, tmp_path, tokenizer_config={"eos_token": value})
    with pytest.raises(
        ConfigError, match=r"tokenizer_config\.json: eos_token is .*; expected a text, or an object with"
    ):
        load(tmp_path)


def test_eos_token_beyond_the_logits(original, tmp_path):
    folder(original, tmp_path, tokenizer_config={"eos_token": "<|far|>"})
    library = Library.from_file(str(tmp_path / "tokenizer.json"))
    library.add_special_tokens([f"<|{n}|>" for n in range(288 - len(TOKENS))] + ["<|far|>"])
    library.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match=r"eos_token is '<\|far\|>', with id 288; expected one below vocab_size 288"):
        load(tmp_path)


@pytest.mark.parametrize("token", ["<|nowhere|>", "\ud800", ""])
def test_eos_token_that_the_vocabulary_lacks_is_said(original, token, tmp_path, caplog):
    model = load(folder(original, tmp_path, tokenizer_config={"eos_token": token}))
    assert model._prompts._end_ids(NOTHING, is_chat=False) == USUAL
    assert f"eos_token is {token!r}, which the vocabulary does not have; it will not end a text" in caplog.text


def test_a_generation_config_that_leads_nowhere_is_refused(original, tmp_path):
    (folder(original, tmp_path) / "generation_config.json").symlink_to(tmp_path / "nothing.json")
    with pytest.raises(CheckpointError, match=r"generation_config\.json: not readable"):
        open_checkpoint(tmp_path)


def test_ends_beyond_the_logits_forbid_nothing(original):
    """Where they come from a caller, or from a tokenizer with more ids than the model has logits."""
    model = Model(original.module, None, Generation(end_ids=frozenset({5, 288, 10**6})), cache_tokens=128)
    assert model.generate([1, 2], max_tokens=4, min_tokens=3).num_tokens >= 3


WRONG_VALUES = [
    ("temperature", "hot"),
    ("temperature", -0.5),
    ("temperature", float("nan")),
    ("temperature", 10**400),
    ("temperature", [0.7]),
    ("top_k", -1),
    ("top_k", 0.5),
    ("top_k", True),
    ("top_p", 1.5),
    ("top_p", float("inf")),
    ("min_p", -0.1),
    ("repetition_penalty", 0),
    ("repetition_penalty", {}),
    ("do_sample", "yes"),
    ("do_sample", 1),
    ("max_new_tokens", 0),
    ("max_new_tokens", "20"),
    ("max_length", -5),
    ("max_length", 20.5),
]


@pytest.mark.parametrize(("name", "value"), WRONG_VALUES, ids=lambda value: str(value)[:12])
def test_values_that_cannot_be_meant(original, name, value, tmp_path):
    folder(original, tmp_path, generation_config={name: value})
    with pytest.raises(ConfigError, match=rf"generation_config\.json: {name} is .{{1,110}}; expected [^;]+$"):
        open_checkpoint(tmp_path)


def test_null_says_nothing(original, tmp_path):
    names = ["eos_token_id", "do_sample", "temperature", "top_k", "max_new_tokens", "max_length", "num_beams"]
    folder(original, tmp_path, generation_config=dict.fromkeys(names))
    generation = open_checkpoint(tmp_path).generation
    assert (generation.end_ids, generation.sampling) == (frozenset(), {"temperature": 0.0})
    assert (generation.max_new_tokens, generation.max_length) == (None, None)


def test_greedy_unless_it_samples():
    fields = {"temperature": 0.7, "top_p": 0.8, "top_k": 20}
    greedy, sampled = (Generation.from_fields(fields | {"do_sample": each}, 9, "f").sampling for each in (False, True))
    assert (greedy, sampled) == (fields | {"temperature": 0.0}, fields)
    assert Generation.from_fields({"do_sample": True}, 9, "f").sampling == {"temperature": 1.0}


def test_a_gguf_without_top_k_and_with_all(original):
    told = {"general.sampling.temp": 0.5, "general.sampling.top_k": -1}
    assert Generation.from_gguf(told, 9, "f").sampling == {"temperature": 0.5, "top_k": 0}
    for key, value in (("temp", float("nan")), ("top_k", -2), ("top_p", 2)):
        key = f"general.sampling.{key}"
        with pytest.raises(ConfigError, match=rf"f: {re.escape(key)} is .*; expected"):
            Generation.from_gguf({key: value}, 9, "f")


# How long


LENGTHS = [
    {"max_new_tokens": 5},
    {"max_length": 9},
    {"max_length": 9, "max_new_tokens": 3},
    {"max_length": 4, "max_new_tokens": 7},
]


@pytest.mark.parametrize("place", ["generation_config", "config"])
@pytest.mark.parametrize("fields", LENGTHS, ids=str)
def test_lengths_are_those_of_transformers(original, fields, place, tmp_path):
    folder(original, tmp_path, **{place: fields})
    theirs = Qwen2ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    prompt = [3, 1, 4, 1, 5]
    settings = {"pad_token_id": 0, "do_sample": False}
    expected = theirs.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist()
    ours = load(tmp_path)
    assert ours.generate(prompt, ignore_eos=True).token_ids == expected
    assert ours.generate(prompt, ignore_eos=True, max_tokens=11).num_tokens == 11  # a caller's goes before it
    assert len(ours.score([1] * 30).token_ids) == 30


def test_without_a_length_a_text_may_fill_the_context(original, tmp_path):
    assert load(folder(original, tmp_path)).generate([1] * 5, ignore_eos=True).num_tokens == 123


def test_lengths_that_allow_nothing(original, tmp_path):
    """The errors name the file without its folder, because a server tells them to its clients."""
    model = load(folder(original, tmp_path, generation_config={"max_length": 6}))
    theirs = Qwen2ForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`max_length` is set to 6"):
        theirs.generate(torch.tensor([[1] * 6]), pad_token_id=0)
    message = r"prompt has 6 tokens, and max_length of generation_config\.json is 6; expected a shorter prompt, or max_"
    with pytest.raises(RequestError, match=message):
        model.generate([1] * 6)
    assert model.generate([1] * 6, max_tokens=1).num_tokens == 1
    with pytest.raises(
        RequestError, match=r"min_tokens is 4, and generation_config\.json allows 3 tokens after 3 of a prompt"
    ):
        model.generate([1] * 3, min_tokens=4)


def test_a_length_beyond_the_context_ends_there(original, tmp_path):
    model = load(folder(original, tmp_path, generation_config={"max_new_tokens": 10**30}))
    assert model.generate([1] * 120, ignore_eos=True).num_tokens == 8
    assert model.generate([1] * 128, ignore_eos=True).num_tokens == 1


# What is not supported


# Of transformers' GenerationConfig: what changes no text here, or what a caller of ours asks for himself.
WITHOUT_EFFECT = {
    *("assistant_confidence_threshold", "assistant_early_exit", "assistant_ensemble_weight", "assistant_lookbehind"),
    *("bos_token_id", "cache_config", "cache_implementation", "compile_config", "continuous_batching_config"),
    *("decoder_start_token_id", "disable_compile", "early_stopping", "is_assistant", "length_penalty", "low_memory"),
    *("max_cache_len", "max_matching_ngram_size", "num_assistant_tokens", "num_assistant_tokens_schedule"),
    *("output_attentions", "output_hidden_states", "output_logits", "output_scores", "pad_token_id"),
    *("prefill_chunk_size", "prompt_lookup_num_tokens", "renormalize_logits", "return_dict_in_generate"),
    *("speculation_type", "target_lookbehind", "transformers_version", "use_cache", "use_mtp"),
}


def test_every_field_of_transformers_is_honoured_or_named():
    honoured = {*room._SAMPLING, "do_sample", "eos_token_id", "max_new_tokens", "max_length"}
    known = {name for name in GenerationConfig().to_dict() if not name.startswith("_")}
    assert known - honoured - room._NOT_BUILT.keys() == WITHOUT_EFFECT & known
    theirs = GenerationConfig._get_default_generation_params()
    for name in room._NOT_BUILT.keys() & theirs.keys():
        assert theirs[name] == room._NOT_BUILT[name], name


def test_fields_that_are_not_built_are_named_once(original, tmp_path, caplog):
    asked = {"suppress_tokens": [3], "no_repeat_ngram_size": 2, "num_beams": 4, "typical_p": 1.0, "bad_words_ids": []}
    folder(original, tmp_path, generation_config=asked | {"chat_format": "chatml"})
    model = load(tmp_path)
    for _ in range(2):
        model.generate([1], max_tokens=1)
    [record] = [each for each in caplog.records if each.name == "qwenkern.generation"]
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(f"{tmp_path / 'generation_config.json'}: ")
    assert re.findall(r"\b\w+_\w+\b", record.getMessage().split(": ", 1)[1]) == [
        "no_repeat_ngram_size",
        "num_beams",
        "suppress_tokens",
    ]


def test_neutral_fields_are_not_named(original, caplog):
    Generation.from_fields(GenerationConfig._get_default_generation_params(), 9, "f")
    Generation.from_fields(GenerationConfig().to_dict(), 9, "f")
    Generation.from_gguf({"general.sampling.mirostat": 0, "general.sampling.xtc_probability": 0.0}, 9, "f")
    assert not caplog.records
    Generation.from_gguf({"general.sampling.mirostat": 2}, 9, "f")
    assert "f: qwenkern does not support general.sampling.mirostat, " in caplog.text
