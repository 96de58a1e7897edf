"""Quantised models: their memory, computed before loading from headers or from the configuration alone, and
measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import pytest
import torch
from support.models import TINY, tiny_model
from support.packers import CONFIG, awq, gptq, int_quantized, integers, pack_quantized, scheme, write_checkpoint
from support.toy_tokenizer import byte_library

from qwenkern import Config, Model, RequestError
from qwenkern.checkpoint import open_checkpoint, own
from qwenkern.checkpoint.formats import formats_of, stored_formats, without_memory
from qwenkern.checkpoint.packing import unpacked
from qwenkern.footprint import Memory, fit, layout_of
from qwenkern.kernels import Weight
from qwenkern.kernels.weights import FORMATS

CPU = torch.device("cpu")
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
FP8 = scheme(8, "channel", "float-quantized", type="float")


def _fp8(name: str, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    return {"weight": torch.ones(shape).to(torch.float8_e4m3fn), "weight_scale": torch.ones(shape[0], 1)}


def _of(pack: Callable, bits: int, group: int, symmetric: bool = True) -> Callable:
    return lambda name, shape: pack(integers(shape, bits, group, symmetric))


CASES = {
    "gptq": (GPTQ, _of(lambda matrix: gptq(matrix, 4), 4, 32, symmetric=False)),
    "gptq of 8 bits": (GPTQ | {"bits": 8, "group_size": -1}, _of(lambda matrix: gptq(matrix, 8), 8, -1)),
    "gptq, small groups": (GPTQ | {"group_size": 16}, _of(lambda matrix: gptq(matrix, 4), 4, 16)),  # becomes dense
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 64, "version": "GEMM"}, _of(awq, 4, 64)),
    "awq, some dense": (
        {"quant_method": "awq", "bits": 4, "group_size": 64, "modules_to_not_convert": ["mlp"]},
        lambda name, shape: {"weight": torch.ones(shape)} if "mlp" in name else awq(integers(shape, 4, 64)),
    ),
    "pack-quantized": (
        scheme(4, "group", "pack-quantized", group_size=32),
        _of(lambda matrix: pack_quantized(matrix, 4, True), 4, 32),
    ),
    "int-quantized": (
        scheme(8, "channel", "int-quantized"),
        _of(lambda matrix: int_quantized(matrix, 8, True), 8, -1),
    ),
    "fp8": (FP8, _fp8),
}


def described(weights: Mapping[str, Weight]) -> dict[str, tuple]:
    return {
        name: (weight.format, [(each.shape, each.dtype) for each in weight.tensors[:-1]])
        for name, weight in weights.items()
    }


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


@pytest.mark.parametrize("case", CASES)
def test_a_configuration_says_what_the_headers_say(case, tmp_path):
    write_checkpoint(tmp_path, *CASES[case])
    checkpoint = open_checkpoint(tmp_path)
    assert described(stored_formats(Config.from_json(tmp_path / "config.json"), torch.float32)) == described(
        checkpoint.formats
    )
    assert bool(checkpoint.formats) == (case != "gptq, small groups")


@pytest.mark.parametrize("case", CASES)
def test_a_quantised_checkpoint_takes_what_was_computed(case, tmp_path):
    write_checkpoint(tmp_path, *CASES[case])
    checkpoint = open_checkpoint(tmp_path)
    layout = layout_of(checkpoint.config, CPU, stored=checkpoint.formats)
    assert layout.weights == layout_of(checkpoint.config, CPU).weights
    assert_takes(Model.from_pretrained(tmp_path, device="cpu", cache_tokens=200), layout)


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8", "fp8"])
@pytest.mark.parametrize(
    ("quantize", "forms"),
    [
        (None, {"dense"}),
        ("none", {"dense"}),
        ("int8", {"int8", "dense"}),
        ("int4", {"int4", "dense"}),
        ("fp8", {"fp8"}),
    ],
)
def test_what_is_quantised_here_takes_what_was_computed(quantize, forms, kv_cache_dtype):
    """Some matrices of the tiny model have sizes that int8 and int4 lack."""
    options = {"quantize": quantize, "kv_cache_dtype": kv_cache_dtype}
    layout = layout_of(TINY, CPU, **options)
    assert_takes(Model.from_config(TINY, device="cpu", cache_tokens=200, **options), layout)
    assert {weight.format for weight in layout.matrices.values()} == forms


def assert_takes(model: Model, layout) -> None:
    assert model.dtype == layout.dtype
    assert type(model.cache.pages[0]) is layout.pages
    assert sum(parameter.nbytes for parameter in model.module.parameters()) == layout.weights
    assert sum(pages.nbytes for pages in model.cache.pages) == layout.cache(model.cache.num_pages)


def test_our_own_files_stay_mapped(tmp_path, monkeypatch):
    """What the system can read again is no reason to refuse a model on a CPU."""
    model = tiny_model(CONFIG, torch.bfloat16)
    weights = dict(unpacked(model.module, CONFIG))
    for name, form in formats_of(CONFIG, "int8", torch.float32).items():
        if form.format == "int8":
            matrix = weights[name]
            weights[name] = FORMATS["int8"].allocate(*matrix.shape, torch.float32, _empty)
            weights[name].copy_(matrix)
    fields = {name: getattr(CONFIG, name) for name in ("vocab_size", "hidden_size", "intermediate_size", "head_dim")}
    fields |= {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "model_type": "qwen2"}
    files = {"tokenizer.json": byte_library().to_str().encode()}
    own.write_checkpoint(tmp_path / "own", fields, files, weights.items())
    checkpoint = open_checkpoint(tmp_path / "own")
    assert described(stored_formats(checkpoint.config, torch.float32)) == described(checkpoint.formats) != {}
    layout = layout_of(checkpoint.config, CPU)
    mapped = sum(weight.nbytes for weight in checkpoint.formats.values())
    enough = layout.least().total - mapped
    monkeypatch.setattr(fit, "memory_of", lambda device: Memory(enough - 1, enough - 1))
    with pytest.raises(RequestError, match="own: does not fit on cpu"):
        Model.from_pretrained(tmp_path / "own", device="cpu")
    monkeypatch.setattr(fit, "memory_of", lambda device: Memory(enough, enough))
    assert_takes(Model.from_pretrained(tmp_path / "own", device="cpu", cache_tokens=64), layout)


def test_groups_of_other_sizes_than_a_formats_own():
    small, large = (without_memory(64, 256, "int4", torch.float32, group) for group in (32, 256))
    assert small.nbytes - large.nbytes == 64 * (256 // 32 - 1) * 3, "a scale and a zero point"


@pytest.mark.demo
def test_the_demos_file_in_memory(demo_path):
    """Its blocks as they are, but for the scales of Q4_K, which take four bytes more for 256 values. By llama.cpp's
    rules its mix, Q4_K_M, has as many bytes; other layers have the larger types."""
    checkpoint = open_checkpoint(demo_path)
    layout = layout_of(checkpoint.config, CPU, stored=checkpoint.formats)
    infos = [info for _, info in checkpoint.places.values()]
    blocks = sum(info.num_bytes for info in infos)  # norms and biases are float32 in the file, too
    widened = sum(4 * math.prod(info.shape) // 256 for info in infos if info.kind.name == "Q4_K")
    assert layout.weights == blocks + widened == 486_269_440
    assert layout_of(checkpoint.config, CPU, quantize="q4_k_m").weights == layout.weights
