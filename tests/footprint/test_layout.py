"""The bytes of weights and cache, against numbers by hand and against real models."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from support.models import TINY, tiny_model

from qwenkern import RequestError
from qwenkern.checkpoint.formats import formats_of, matrices
from qwenkern.checkpoint.mixes import MIXES, mixed
from qwenkern.config import FAMILY
from qwenkern.engine.capture import PROMPT_LENGTHS, GraphCapture
from qwenkern.footprint import Layout, layout_of
from qwenkern.footprint import layout as allowances
from qwenkern.footprint.layout import captured_steps
from qwenkern.kernels.triton import many_tokens

SMALL = FAMILY["qwen2.5-3b"]
GPU, CPU = torch.device("cuda"), torch.device("cpu")
EMBEDDING = 151936 * 2048
LAYERS = 36 * (2048 * (2048 + 2 * 256) + 2048 * 2048 + 3 * 2048 * 11008)  # values of the layers' matrices
VECTORS = 36 * (2048 + 2 * 256 + 2 * 2048) + 2048  # biases and norms
BLOCKS = {  # bytes, values
    "q4_0": (18, 32),
    "q4_1": (20, 32),
    "q5_0": (22, 32),
    "q5_1": (24, 32),
    "q8_0": (34, 32),
    "q4_k": (148, 256),  # 144 in a file: scales and minima of six bits take a byte each
    "q5_k": (180, 256),
    "q6_k": (210, 256),
    "int4": (64 + 3, 128),  # a scale of two bytes, a zero point of one
    "int8": (128 + 3, 128),
}


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("qwen2.5-3b", "bfloat16", 6_171_877_376),
        ("qwen2.5-3b", "float32", 2 * 6_171_877_376),
        ("qwen2.5-0.5b", "bfloat16", 988_065_536),
        ("qwen2.5-7b", "float16", 15_231_233_024),  # its head is not its embedding
    ],
)
def test_dense_weights_are_the_parameters(name, dtype, expected):
    assert layout_of(FAMILY[name], GPU, dtype=dtype).weights == expected


@pytest.mark.parametrize("form", BLOCKS)
def test_quantised_weights_are_blocks(form):
    layout = layout_of(SMALL, GPU, quantize=form)
    size, values = BLOCKS[form]
    if form == "int4":  # its embedding, which is the head, is int8
        expected = {"int4": LAYERS * 67 // 128, "int8": EMBEDDING * 131 // 128}
    else:
        expected = {form: (LAYERS + EMBEDDING) * size // values}
    assert layout.weights_by_format == expected
    assert layout.weights == sum(expected.values()) + 2 * VECTORS


def test_a_matrix_whose_shape_a_format_lacks_is_dense():
    """256 does not divide the 896 columns of the 0.5B; it divides the 4,864 of its down projection."""
    found = formats_of(FAMILY["qwen2.5-0.5b"], "q4_k", torch.float32)
    assert {each.format for name, each in found.items() if "down_proj" in name} == {"q4_k"}
    assert {each.format for name, each in found.items() if "down_proj" not in name} == {"dense"}


def test_on_a_cpu_quantised_weights_run_in_float32():
    layout = layout_of(SMALL, CPU, quantize="q8_0")
    assert (layout.dtype, layout.cache_name) == (torch.float32, "float32")
    assert layout.weights == (LAYERS + EMBEDDING) * 34 // 32 + 4 * VECTORS
    assert layout_of(SMALL, CPU).dtype == torch.bfloat16
    assert layout_of(SMALL, GPU, quantize="q8_0").cache_name == "bfloat16"


@pytest.mark.parametrize(("dtype", "token"), [("bfloat16", 36_864), ("float16", 36_864), ("float32", 73_728)])
def test_the_cache_has_a_spare_page(dtype, token):
    layout = layout_of(SMALL, GPU, dtype=dtype)
    assert layout.token == token
    assert layout.cache(10) == 11 * 64 * token
    assert layout.footprint(100, sequences=3).cache == (3 * 2 + 1) * 64 * token, "a sequence has whole pages"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_takes_what_was_computed(dtype):
    model = tiny_model(dtype=dtype, cache_tokens=200)
    layout = layout_of(TINY, CPU, dtype=str(dtype).removeprefix("torch."))
    assert sum(parameter.nbytes for parameter in model.module.parameters()) == layout.weights
    assert sum(pages.nbytes for pages in model.cache.pages) == layout.cache(model.cache.num_pages)


# What llama.cpp's quantiser made of the 0.5B in Q4_K_M, with a head of its own: the file that is the demo.
DEMO = {
    ("mlp.down_proj", "q4_k"): 12,
    ("mlp.down_proj", "q6_k"): 12,
    ("mlp.gate_proj", "q5_0"): 24,
    ("mlp.up_proj", "q5_0"): 24,
    ("self_attn.q_proj", "q5_0"): 24,
    ("self_attn.k_proj", "q5_0"): 24,
    ("self_attn.o_proj", "q5_0"): 24,
    ("self_attn.v_proj", "q5_0"): 12,
    ("self_attn.v_proj", "q8_0"): 12,
    ("embed_tokens", "q5_0"): 1,
    ("lm_head", "q8_0"): 1,
}


def test_the_mix_q4_k_m_is_that_of_the_demos_file():
    config = replace(FAMILY["qwen2.5-0.5b"], tie_word_embeddings=False)
    found = mixed("q4_k_m", matrices(config), config.num_hidden_layers)
    counted = Counter(
        (".".join(name.split(".")[3 if "layers" in name else -2 : -1]), kind) for name, kind in found.items()
    )
    assert counted == DEMO


@pytest.mark.parametrize(
    ("mix", "name", "part", "expected"),
    [
        ("q4_k_m", "qwen2.5-3b", "embed_tokens", {"q6_k"}),  # tied: it is the head
        ("q4_k_m", "qwen2.5-7b", "embed_tokens", {"q4_k"}),
        ("q4_k_m", "qwen2.5-72b", "v_proj", {"q5_k", "q6_k"}),
        ("q4_k_m", "qwen2.5-7b", "v_proj", {"q4_k", "q6_k"}),
        ("q5_k_s", "qwen2.5-7b", "v_proj", {"q5_k"}),
        ("q4_k_s", "qwen2.5-7b", "down_proj", {"q5_k", "q4_k"}),
        ("q3_k_m", "qwen2.5-7b", "o_proj", {"q4_k"}),
        ("q3_k_m", "qwen2.5-7b", "gate_proj", {"q3_k"}),
        ("q3_k_m", "qwen2.5-0.5b", "gate_proj", {"q4_0"}),  # 256 does not divide its columns
    ],
)
def test_types_of_mixes(mix, name, part, expected):
    config = FAMILY[name]
    found = mixed(mix, matrices(config), config.num_hidden_layers)
    assert {kind for each, kind in found.items() if part in each} == expected


def test_more_bits_go_to_the_layers_that_llama_cpp_says():
    """use_more_bits: the first and the last eighth, and every third between."""
    config = FAMILY["qwen2.5-7b"]  # 28 layers
    found = mixed("q4_k_m", matrices(config), 28)
    larger = [i for i in range(28) if found[f"model.layers.{i}.mlp.down_proj.weight"] == "q6_k"]
    assert larger == [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 24, 25, 26, 27]
    assert larger == [i for i in range(28) if found[f"model.layers.{i}.self_attn.v_proj.weight"] == "q6_k"]


@pytest.mark.parametrize("quantize", [None, "int4"])
@pytest.mark.parametrize("sequences", [1, 16])
@pytest.mark.parametrize("memory", [8e9, 24e9])
def test_the_longest_context_fits_and_a_page_more_does_not(quantize, sequences, memory):
    layout = layout_of(replace(SMALL, max_position_embeddings=1 << 22), GPU, quantize=quantize)
    longest = layout.longest_context(int(memory), sequences)
    if longest:
        assert layout.footprint(longest, sequences).total <= memory
    assert layout.footprint(longest + 1, sequences).total > memory


def test_the_longest_context_is_at_most_the_models():
    assert layout_of(SMALL, GPU).longest_context(10**12) == 32768
    assert layout_of(SMALL, GPU).longest_context(10**9) == 0


def test_activations_are_those_of_a_pass():
    """Qwen2.5-3B in bfloat16: gate, up and their product, x, its norm, q and the output; logits; cosines and sines."""
    layout = layout_of(SMALL, GPU)
    assert layout.activations(4096, 2, 500) == 4096 * (3 * 11008 + 4 * 2048) * 2 + 2 * 151936 * 4 + 500 * 128 * 4
    quantised = layout_of(SMALL, GPU, quantize="int8")
    assert quantised.scratch(49) == many_tokens.SCRATCH < 2 * 11008 * 2048 * 2, "less than gate and up, dequantised"
    assert quantised.scratch(many_tokens.PACKED_TOKENS) == layout.scratch(49) == 0
    tiny = layout_of(FAMILY["qwen2.5-0.5b"], GPU, quantize="int8")
    assert tiny.scratch(49) == 2 * 4864 * 896 * 2, "gate and up, dequantised"
    on_cpu = layout_of(SMALL, CPU, quantize="int8")
    assert on_cpu.scratch(17) == 2 * 11008 * 2048 * on_cpu.dtype.itemsize
    assert on_cpu.scratch(16) == 0


def test_graphs_are_counted_as_they_are_captured():
    for sequences in range(1, 70):
        padded = {GraphCapture.padded(None, count) for count in range(1, sequences + 1)}  # type: ignore[arg-type]
        assert captured_steps(sequences) == len(padded)
    assert len(PROMPT_LENGTHS) == allowances._PROMPT_LENGTHS
    assert layout_of(SMALL, GPU).graphs(1) == 36 * (6 * 1 + 10 * 16) * 32768
    assert layout_of(SMALL, GPU, quantize="int4").graphs(1) == 36 * (6 * 1 + 20 * 16) * 32768
    assert layout_of(SMALL, CPU).graphs(1) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "q4_z"}, "quantize is 'q4_z'; expected None or one of 'dense', .*'q4_k_m'"),
        ({"dtype": "int8"}, r"dtype is 'int8' \(int8\); expected 'auto', 'bfloat16'"),
        ({"kv_cache_dtype": "q4_0"}, "kv_cache_dtype is 'q4_0'; expected one of 'auto', 'bfloat16'"),
        ({"kv_cache_dtype": "float32"}, "kv_cache_dtype is 'float32', and the model computes in bfloat16"),
    ],
)
def test_other_names_are_refused(options, message):
    with pytest.raises(RequestError, match=message):
        layout_of(SMALL, GPU, **options)


def test_every_mix_is_of_formats_that_llama_cpp_has():
    kinds = {f"q{bits}_{kind}" for bits in range(2, 9) for kind in ("0", "1", "k")}
    for mix in MIXES:
        for config in FAMILY.values():
            assert set(mixed(mix, matrices(config), config.num_hidden_layers).values()) <= kinds
            assert Layout(config, formats_of(config, mix, torch.bfloat16), torch.bfloat16, on_gpu=True).weights
