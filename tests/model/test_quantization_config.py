"""The quantisation in a config.json, and the kinds that are refused before any weight is read."""

from __future__ import annotations

from typing import Any

import pytest

from qwenkern import Config
from qwenkern.errors import CheckpointError
from qwenkern.quantization_config import MATRIX, ROW, Quantization

QWEN = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
}
# as published in the configurations of Qwen2.5-3B-Instruct-GPTQ-Int4 and -AWQ
GPTQ = {
    "bits": 4,
    "group_size": 128,
    "damp_percent": 0.01,
    "desc_act": False,
    "static_groups": False,
    "sym": True,
    "true_sequential": True,
    "model_name_or_path": None,
    "model_file_base_name": "model",
    "quant_method": "gptq",
    "exllama_config": {"version": 1},
}
AWQ = {
    "bits": 4,
    "group_size": 128,
    "modules_to_not_convert": None,
    "quant_method": "awq",
    "version": "gemm",
    "zero_point": True,
}


def compressed(fields: dict[str, Any] | None = None, **weights: Any) -> dict[str, Any]:
    """W8A8 of llm-compressor."""
    scheme = {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": None,
        "num_bits": 8,
        "observer": "minmax",
        "observer_kwargs": {},
        "strategy": "channel",
        "symmetric": True,
        "type": "int",
    }
    activations = {"num_bits": 8, "dynamic": True, "strategy": "token", "type": "int"}
    group = {"input_activations": activations, "output_activations": None, "targets": ["Linear"]}
    return {
        "config_groups": {"group_0": group | {"weights": scheme | weights}},
        "format": "int-quantized",
        "global_compression_ratio": 1.4,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    } | (fields or {})


def read(found: Any, field: str = "quantization_config") -> Quantization | None:
    return Config.from_dict(QWEN | {field: found}, source="config.json").quantization


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (None, None),
        ({}, None),
        (GPTQ, Quantization("gptq", "gptq", 4, "int", 128, True)),
        (GPTQ | {"bits": 8, "group_size": -1}, Quantization("gptq", "gptq", 8, "int", ROW, True)),
        (
            GPTQ | {"checkpoint_format": "gptq_v2", "sym": False, "meta": {"quantizer": ["gptqmodel:1.0"]}},
            Quantization("gptq", "gptq_v2", 4, "int", 128, False),
        ),
        (
            GPTQ | {"sym": False, "meta": {"quantizer": "gptqmodel:1.0"}, "dynamic": {r"-:.*down.*": {}}},
            Quantization("gptq", "gptq", 4, "int", 128, False, carries=True),
        ),
        (AWQ, Quantization("awq", "gemm", 4, "int", 128)),
        (
            {
                "w_bit": 4,
                "q_group_size": 64,
                "version": "GEMM",
                "quant_method": "AWQ",
                "modules_to_not_convert": ["lm"],
            },
            Quantization("awq", "gemm", 4, "int", 64, ignore=("lm",)),
        ),
        (
            compressed(type="float", fields={"format": "float-quantized"}, strategy="tensor"),
            Quantization("compressed-tensors", "float-quantized", 8, "float", MATRIX, True, ignore=("lm_head",)),
        ),
        (
            compressed(num_bits=4, strategy=None, group_size=64, symmetric=False, fields={"format": "pack-quantized"}),
            Quantization("compressed-tensors", "pack-quantized", 4, "int", 64, False, ignore=("lm_head",)),
        ),
        (
            {"quant_method": "qwenkern", "version": 1, "formats": {"lm_head": "q8_0"}},
            Quantization("qwenkern", formats={"lm_head": "q8_0"}),
        ),
    ],
)
def test_what_is_read(found, expected):
    quantization = read(found)
    if expected is not None and expected.method == "compressed-tensors":
        [note] = quantization.notes
        assert note == "config.json: quantization_config quantises input activations; qwenkern does not"
        expected = Quantization(**vars(expected) | {"notes": (note,)})
    assert quantization == expected


def test_the_earlier_name_of_compressed_tensors():
    assert read(compressed(), "compression_config").storage == "int-quantized"


def test_modules_that_are_not_quantised():
    exact = read(compressed({"ignore": ["lm_head", "re:.*o_proj"]}))
    assert exact.ignores("lm_head")
    assert not exact.ignores("model.lm_head")
    part = read(AWQ | {"modules_to_not_convert": ["layers.0."]})
    assert part.ignores("model.layers.0.mlp.up_proj")
    assert not part.ignores("model.layers.10.mlp.up_proj")


SUPPORTED = "which is not supported; expected GPTQ with 4 or 8 bits, AWQ .* a GGUF file of it"
REFUSALS = {
    "bitsandbytes": ({"load_in_4bit": True}, rf"quantised by 'bitsandbytes', {SUPPORTED}"),
    "bitsandbytes by name": ({"quant_method": "bitsandbytes"}, "quantised by 'bitsandbytes'"),
    "MLX": ({"group_size": 64, "bits": 4}, "quantised by 'MLX'"),
    "something": ({"bits": 4}, "quantised by None"),
    "text": ("gptq", "is 'gptq'; expected an object"),
    "a number for a name": ({"quant_method": 3}, "quantised by 3, which"),
    **{
        name: ({"quant_method": name, "bits": 4, "group_size": 128}, f"quantised by '{name}', which is not supported")
        for name in ("aqlm", "exl2", "gguf", "fp8", "hqq", "marlin", "auto-round", "fbgemm_fp8", "torchao", "mxfp4")
    },
    "gptq with 3 bits": (GPTQ | {"bits": 3}, "has bits 3, which is not supported; expected 4 or 8: use the model that"),
    "gptq with text": (GPTQ | {"bits": "4"}, "has bits '4'"),
    "gptq without bits": ({"quant_method": "gptq", "group_size": 32}, "has bits None"),
    "gptq with truth": (
        GPTQ | {"group_size": True},
        "has group_size True, which is not supported; expected a positive",
    ),
    "gptq without groups": ({"quant_method": "gptq", "bits": 4}, "has group_size None"),
    "gptq with groups of 5,000 digits": (
        GPTQ | {"group_size": 10**5000},
        "has group_size a int that cannot be written",
    ),
    "gptq with groups of 0": (GPTQ | {"group_size": 0}, "has group_size 0"),
    "marlin": (GPTQ | {"checkpoint_format": "marlin"}, "has checkpoint_format 'marlin', .*'gptq' or 'gptq_v2'"),
    "marlin, newer": (GPTQ | {"format": "marlin"}, "has format 'marlin'"),
    "marlin, older": (GPTQ | {"is_marlin_format": True}, "has is_marlin_format true"),
    "words of 64 bits": (GPTQ | {"pack_dtype": "int64"}, "has pack_dtype 'int64'"),
    "mixed bits": (
        GPTQ | {"dynamic": {"+:.*down.*": {"bits": 8}}},
        r"other settings for some modules in dynamic: '\+:",
    ),
    "awq gemv": (AWQ | {"version": "gemv"}, "has version 'gemv', which is not supported; expected 'gemm'"),
    "awq of llm-awq": (AWQ | {"backend": "llm-awq"}, "has backend 'llm-awq'"),
    "awq without zero points": (AWQ | {"zero_point": False}, "has zero_point False"),
    "awq with 3 bits": (AWQ | {"bits": 3}, "has bits 3"),
    "awq with a name": (
        AWQ | {"modules_to_not_convert": "lm_head"},
        "modules_to_not_convert 'lm_head'; expected a list",
    ),
    "fp8 with blocks": (
        compressed({"format": "float-quantized"}, type="float", strategy="block", block_structure=[128, 128]),
        "weights has strategy 'block', which is not supported; expected 'tensor' or 'channel'",
    ),
    "fp8 with groups": (
        compressed({"format": "float-quantized"}, type="float", strategy="group", group_size=64),
        "'group'",
    ),
    "fp4": (compressed({"format": "nvfp4-pack-quantized"}, type="float", num_bits=4), "has num_bits 4, .*; expected 8"),
    "int2": (compressed(num_bits=2), "has num_bits 2, which is not supported; expected 4 or 8"),
    "marlin of 24": (compressed({"format": "marlin-24"}), "has format 'marlin-24', .*'int-quantized' or 'pack-quan"),
    "sparse": (
        compressed({"sparsity_config": {"format": "sparse-24-bitmask"}}),
        "sparsity_config has format 'sparse-24",
    ),
    "not compressed": (compressed({"quantization_status": "frozen"}), "has quantization_status 'frozen'"),
    "no groups": (compressed({"config_groups": {}}), "config_groups is empty"),
    "no weights": (compressed({"config_groups": {"group_0": {}}}), "group_0.weights is None; expected an object"),
    "mixed formats": (
        compressed({"config_groups": {"a": {"weights": {"num_bits": 8}}, "b": {"weights": {"num_bits": 4}}}}),
        "has 2 config_groups whose weights differ, which is not supported; expected one scheme",
    ),
    "ours, later": ({"quant_method": "qwenkern", "version": 2, "formats": {"a": "b"}}, "has version 2, .* expected 1"),
    "ours, without formats": ({"quant_method": "qwenkern", "version": 1}, "formats is None; expected an object"),
    "ours, of numbers": ({"quant_method": "qwenkern", "version": 1, "formats": {"a": 1}}, "formats is {'a': 1}"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_refused(case):
    found, message = REFUSALS[case]
    with pytest.raises(CheckpointError, match=rf"^config\.json: quantization_config.*{message}"):
        read(found)


def test_mlx_under_its_own_name():
    with pytest.raises(CheckpointError, match=r"^config\.json: quantization says that .* quantised by 'MLX'"):
        read({"group_size": 64, "bits": 4}, "quantization")
