"""Configurations: the family's numbers, both spellings of config.json, GGUF metadata, and refusals."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from qwenkern import Config, ConfigError, YarnScaling
from qwenkern.config import FAMILY

QWEN_3B = {
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "max_position_embeddings": 32768,
    "max_window_layers": 70,
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
GGUF_3B = {
    "general.architecture": "qwen2",
    "qwen2.block_count": 36,
    "qwen2.context_length": 32768,
    "qwen2.embedding_length": 2048,
    "qwen2.feed_forward_length": 11008,
    "qwen2.attention.head_count": 16,
    "qwen2.attention.head_count_kv": 2,
    "qwen2.rope.freq_base": 1000000.0,
    "qwen2.attention.layer_norm_rms_epsilon": 9.999999974752427e-07,
}

# Qwen2.5 technical report and the model cards: exact counts of the safetensors files on the hub
PARAMETERS = {
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
}


@pytest.mark.parametrize("name", FAMILY)
def test_parameter_counts_are_exact(name):
    config = Config.from_name(name)
    assert config.num_parameters == PARAMETERS[name]
    shared = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
    fields = {field: getattr(config, field) for field in [*shared.split(), "tie_word_embeddings"]}
    with torch.device("meta"):
        theirs = Qwen2ForCausalLM(Qwen2Config(**fields))
    assert sum(parameter.numel() for parameter in theirs.parameters()) == PARAMETERS[name]


def test_family_covers_every_size():
    assert FAMILY.keys() == PARAMETERS.keys()
    assert FAMILY["qwen2.5-3b"].num_parameters - FAMILY["qwen2.5-3b"].num_embedding_parameters == 2_774_773_760
    assert FAMILY["qwen2.5-3b"].kv_bytes_per_token() == 36_864


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-3B-Instruct", "qwen2.5-3B", "Qwen/Qwen2.5-Coder-3B"])
def test_names_of_the_same_size(name):
    assert Config.from_name(name) is FAMILY["qwen2.5-3b"]


def test_unknown_name_lists_the_sizes():
    with pytest.raises(ConfigError, match=r"qwen2.5-4b.*expected one of: qwen2.5-0.5b, "):
        Config.from_name("qwen2.5-4b")


def test_config_json_of_the_3b(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(QWEN_3B))
    config = Config.from_json(path)
    assert config.source == str(path)
    assert config == _like(config, FAMILY["qwen2.5-3b"])


def test_both_spellings_agree():
    new = {key: value for key, value in QWEN_3B.items() if key not in ("rope_theta", "torch_dtype")}
    new |= {"rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"}, "dtype": "bfloat16"}
    assert Config.from_dict(new) == Config.from_dict(QWEN_3B)
    yarn = {"rope_type": "yarn", "rope_theta": 1000000.0, "factor": 4.0, "original_max_position_embeddings": 32768}
    assert Config.from_dict(new | {"rope_parameters": yarn}) == Config.from_dict(QWEN_3B | {"rope_scaling": YARN})


def test_what_transformers_writes_is_read(tmp_path):
    Qwen2Config(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters={"rope_theta": 5e5, "rope_type": "default"},
    ).save_pretrained(tmp_path)
    config = Config.from_json(tmp_path / "config.json")
    assert (config.hidden_size, config.head_dim, config.rope_theta) == (64, 16, 5e5)


def test_yarn():
    config = Config.from_dict(QWEN_3B | {"rope_scaling": YARN})
    assert config.rope_scaling == YarnScaling(4.0, 32768)
    assert config.context_length == 131072
    assert config.rope_scaling.attention_scale == pytest.approx(0.1 * math.log(4) + 1)
    assert (
        Config.from_dict(QWEN_3B | {"rope_scaling": YARN | {"attention_factor": 1.5}}).rope_scaling.attention_scale
        == 1.5
    )


def test_gguf_metadata_of_the_3b():
    config = Config.from_gguf(GGUF_3B, vocab_size=151936, tie_word_embeddings=True, source="x.gguf")
    assert config == _like(config, FAMILY["qwen2.5-3b"])
    assert config.rms_norm_eps == 1e-6
    yarn = {
        "qwen2.rope.scaling.type": "yarn",
        "qwen2.rope.scaling.factor": 4.0,
        "qwen2.rope.scaling.original_context_length": 32768,
    }
    assert Config.from_gguf(GGUF_3B | yarn, vocab_size=9, tie_word_embeddings=True).rope_scaling == YarnScaling(
        4.0, 32768
    )


REFUSALS = {
    "another model": ({"model_type": "llama"}, "model_type is 'llama'.*'qwen2'"),
    "no model type": ({"model_type": None}, "model_type is None"),
    "sliding window": (
        {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 35},
        r"layer 35 has sliding-window attention \(sliding_window 4096\), which is not supported",
    ),
    "sliding window of text": ({"use_sliding_window": True, "sliding_window": "4096"}, "sliding_window is '4096'"),
    "no truth for a flag": ({"use_sliding_window": 1}, "use_sliding_window is 1; expected true or false"),
    "window layers": ({"use_sliding_window": True, "max_window_layers": None}, "max_window_layers is None; expected a"),
    "layer types too short": ({"layer_types": ["full_attention"] * 3}, "3 entries for 36 layers"),
    "layer types no list": ({"layer_types": 5}, "layer_types is 5; expected a list"),
    "layer types 0": ({"layer_types": 0}, "layer_types is 0; expected a list"),
    "layer types empty": ({"layer_types": []}, "0 entries for 36 layers"),
    "layer types of numbers": ({"layer_types": [0] * 36}, r"layer_types\[0\] is 0; expected 'full_attention'"),
    "other layer types": (
        {"layer_types": ["full_attention"] * 35 + ["linear_attention"]},
        r"layer_types\[35\] is 'linear_attention'; expected 'full_attention'",
    ),
    "activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; expected 'silu'"),
    "indivisible hidden size": ({"hidden_size": 2050}, "hidden_size 2050 .* 16 attention heads"),
    "layers beyond any model": ({"num_hidden_layers": 1 << 24}, "num_hidden_layers is 16777216; expected .* 1 to 1024"),
    "indivisible heads": ({"num_key_value_heads": 3}, "16 query heads cannot share 3 key-value heads"),
    "zero heads": ({"num_attention_heads": 0}, "0 attention heads"),
    "odd head": ({"head_dim": 127}, "head_dim is 127"),
    "missing": ({"hidden_size": None}, "hidden_size is missing"),
    "text for a number": ({"intermediate_size": "11008"}, "intermediate_size is '11008'"),
    "truth for a number": ({"num_hidden_layers": True}, "num_hidden_layers is True"),
    "negative": ({"vocab_size": -1}, "vocab_size is -1"),
    "huge": ({"vocab_size": 10**12}, "vocab_size is 1000000000000"),
    "zero eps": ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
    "eps not a number": ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan"),
    "theta": ({"rope_theta": -1.0}, "rope_theta is -1.0"),
    "theta of 400 digits": ({"rope_theta": 10**400}, r"rope_theta is 10{76}\.\.\.; expected a positive finite number"),
    "theta infinite": ({"rope_theta": math.inf}, "rope_theta is inf"),
    "theta below 1": ({"rope_theta": 0.5}, "rope_theta is 0.5; expected a number above 1"),
    "theta of text": ({"rope_theta": "1e6"}, "rope_theta is '1e6'"),
    "eps of 400 digits": ({"rms_norm_eps": 10**400}, "rms_norm_eps is 1000"),
    "eps that float32 has not": ({"rms_norm_eps": 1e-60}, "rms_norm_eps is 1e-60"),
    "400 digits": ({"hidden_size": 10**400}, "hidden_size is 10{76}\\.\\.\\.; expected"),
    "head of 400 digits": ({"head_dim": 10**400}, "head_dim is 10{76}\\.\\.\\.; expected a whole number"),
    "head of 0": ({"head_dim": 0}, "head_dim is 0; expected a whole number"),
    "long text": ({"model_type": "x" * 10_000}, "model_type is 'x{76}\\.\\.\\.; qwenkern runs"),
    "text for a flag": ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; expected true or false"),
    "two thetas": ({"rope_parameters": {"rope_theta": 1.0, "rope_type": "default"}}, "rope_theta is 1000000.0 .* 1.0"),
    "unknown rope scaling": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "type 'linear' is not supported"),
    "rope scaling no object": ({"rope_scaling": "yarn"}, "'yarn'; expected an object"),
    "yarn without factor": ({"rope_scaling": {"type": "yarn"}}, "factor is None"),
    "yarn factor below 1": ({"rope_scaling": YARN | {"factor": 0.5}}, "factor is 0.5"),
    "yarn factor huge": ({"rope_scaling": YARN | {"factor": 1e9}}, "factor is 1000000000.0"),
    "yarn factor of 400 digits": ({"rope_scaling": YARN | {"factor": 10**400}}, "factor is 1000"),
    "yarn beta": ({"rope_scaling": YARN | {"beta_fast": 1e-320}}, "beta_fast is 1e-320"),
    "yarn attention": ({"rope_scaling": YARN | {"attention_factor": math.nan}}, "attention_factor is nan"),
    "yarn mscale": ({"rope_scaling": YARN | {"mscale": 1.0}}, "mscale"),
    "yarn original": (
        {"rope_scaling": YARN | {"original_max_position_embeddings": 0}},
        "original_max_position_embeddings is 0; expected a whole",
    ),
}


@pytest.mark.parametrize(("change", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refusals_name_the_file_and_the_number(tmp_path, change, message):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(QWEN_3B | change))
    with pytest.raises(ConfigError, match=message) as refusal:
        Config.from_json(path)
    assert str(path) in str(refusal.value)


def test_a_head_dim_that_is_given_needs_no_division():
    assert Config.from_dict(QWEN_3B | {"hidden_size": 2050, "head_dim": 64}).head_dim == 64
    gguf = GGUF_3B | {"qwen2.embedding_length": 2050, "qwen2.attention.key_length": 64}
    assert Config.from_gguf(gguf, vocab_size=9, tie_word_embeddings=True).head_dim == 64


def test_a_number_of_more_digits_than_python_writes():
    with pytest.raises(ConfigError, match=r"vocab_size is a int that cannot be written: .*digits"):
        Config.from_dict(QWEN_3B | {"vocab_size": 10**5000})


@pytest.mark.parametrize("types", [None, "full", "sliding", "last"])
@pytest.mark.parametrize("first", [0, 1, 3, 4, 70])
@pytest.mark.parametrize("window", [None, 16, 127, 128, 4096])
@pytest.mark.parametrize("use", [False, True])
def test_windows_run_where_transformers_gives_no_layer_one_that_is_shorter_than_the_context(use, window, first, types):
    fields = QWEN_3B | {"num_hidden_layers": 4, "max_position_embeddings": 128, "use_sliding_window": use}
    fields |= {"sliding_window": window, "max_window_layers": first}
    if types:
        kinds = {"full": ["full_attention"] * 4, "sliding": ["sliding_attention"] * 4}
        fields["layer_types"] = kinds.get(types, ["full_attention"] * 3 + ["sliding_attention"])
    theirs = Qwen2Config(**{name: value for name, value in fields.items() if name != "model_type"})
    slides = "sliding_attention" in theirs.layer_types
    if slides and (theirs.sliding_window is None or theirs.sliding_window < 128):  # None: transformers fails later
        with pytest.raises(ConfigError, match=r"layer \d has sliding-window attention"):
            Config.from_dict(fields)
    else:
        assert Config.from_dict(fields) == Config.from_dict(
            QWEN_3B | {"num_hidden_layers": 4, "max_position_embeddings": 128}
        )


def test_the_context_of_a_window_is_the_stretched_one():
    with pytest.raises(ConfigError, match=r"at least the context, 131072"):
        Config.from_dict(
            QWEN_3B
            | {"rope_scaling": YARN, "use_sliding_window": True, "sliding_window": 131071, "max_window_layers": 0}
        )


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"\xff\xfe", b"null", b"[" * 100_000], ids=lambda content: repr(content)[:12]
)
def test_what_is_no_json_object(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"config.json"):
        Config.from_json(path)


def test_swish_is_silu():
    assert Config.from_dict(QWEN_3B | {"hidden_act": "swish"}) == Config.from_dict(QWEN_3B)


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"config.json: no such file"):
        Config.from_json(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": "llama"}, "architecture is 'llama'"),
        ({"qwen2.block_count": None}, "block_count is missing"),
        ({"qwen2.embedding_length": 2049}, "2049"),
        ({"qwen2.rope.scaling.type": "linear"}, "'linear' is not supported"),
        ({"qwen2.attention.head_count": 0}, "0 attention heads"),
        ({"qwen2.attention.head_count": [16] * 36}, r"\[16, 16, .*\.\.\. attention heads"),
        ({"qwen2.rope.dimension_count": 64}, "rope.dimension_count is 64; expected the heads' 128"),
        ({"qwen2.attention.key_length": math.nan}, "head_dim is nan; expected a whole number"),
        ({"qwen2.attention.key_length": 0}, "head_dim is 0; expected a whole number"),
        ({"qwen2.attention.value_length": 64}, "attention.value_length is 64; expected the heads' 128"),
        ({"qwen2.rope.freq_base": math.nan}, "rope_theta is nan"),
        ({"qwen2.attention.layer_norm_rms_epsilon": "small"}, "rms_norm_eps is 'small'"),
        ({"qwen2.rope.scaling.type": "yarn", "qwen2.rope.scaling.factor": math.inf}, "factor is inf"),
    ],
)
def test_gguf_refusals(change, message):
    with pytest.raises(ConfigError, match=message):
        Config.from_gguf(GGUF_3B | change, vocab_size=151936, tie_word_embeddings=True)


def _like(config, expected):
    """``expected`` with the source of ``config``: equality then compares the numbers."""
    from dataclasses import replace

    return replace(expected, source=config.source)
