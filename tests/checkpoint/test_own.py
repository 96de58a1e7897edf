"""Checkpoints that qwenkern writes: every bit is read back, from a mapped file, and no file is ever incomplete."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.packers import LAYER
from support.toy_tokenizer import byte_library
from torch import Tensor

from qwenkern import Model
from qwenkern.checkpoint import open_checkpoint, shards
from qwenkern.checkpoint.own import write_checkpoint
from qwenkern.errors import CheckpointError
from qwenkern.kernels import Weight
from qwenkern.kernels.weights import FORMATS, joined

QUANTISED = [name for name in FORMATS if name != "dense"]
FIELDS = {"model_type": "qwen2", "torch_dtype": "bfloat16", "vocab_size": 503, "hidden_size": 256, "head_dim": 32}
FIELDS |= {
    "intermediate_size": 256,
    "max_position_embeddings": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
SHAPES = {
    "self_attn.q_proj": (256, 256),
    "self_attn.k_proj": (128, 256),
    "self_attn.v_proj": (128, 256),
    "self_attn.o_proj": (256, 256),
    "mlp.gate_proj": (256, 256),
    "mlp.up_proj": (256, 256),
    "mlp.down_proj": (256, 256),
}


def made(form: str, shape: tuple[int, int], seed: int) -> Weight:
    weight = FORMATS[form].allocate(*shape, torch.bfloat16, lambda shape, dtype: torch.zeros(shape, dtype=dtype))
    weight.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
    return weight


def values(forms: list[str]) -> dict[str, Tensor | Weight]:
    """Those of a model, its matrices in turn in these formats."""
    layer: dict[str, Tensor | Weight] = {
        "model.embed_tokens.weight": torch.randn(503, 256).bfloat16(),
        f"{LAYER}input_layernorm.weight": torch.randn(256).bfloat16(),
    }
    for i, (name, shape) in enumerate(SHAPES.items()):
        layer[f"{LAYER}{name}.weight"] = made(forms[i % len(forms)], shape, i)
        if name[-6] in "qkv" and "self" in name:
            layer[f"{LAYER}{name}.bias"] = torch.randn(shape[0]).bfloat16()
    layer[f"{LAYER}post_attention_layernorm.weight"] = torch.randn(256).bfloat16()
    layer["model.norm.weight"] = torch.randn(256).bfloat16()
    layer["lm_head.weight"] = torch.randn(503, 256).bfloat16()
    return layer


def assert_same(folder: Path, expected: dict[str, Tensor | Weight]) -> dict[str, Tensor | Weight]:
    checkpoint = open_checkpoint(folder)
    found = dict(checkpoint.tensors(torch.bfloat16))
    assert found.keys() == expected.keys() == checkpoint.shapes.keys()
    assert checkpoint.formats.keys() == {name for name, value in expected.items() if isinstance(value, Weight)}
    assert checkpoint.num_bytes(torch.bfloat16) == sum(value.nbytes for value in expected.values())
    for name, value in expected.items():
        if isinstance(value, Weight):
            assert type(found[name]) is type(value)
            assert found[name].dtype == torch.bfloat16
            for mine, theirs in zip(found[name].tensors, value.tensors, strict=True):
                assert torch.equal(mine, theirs)
                assert mine.dtype == theirs.dtype
        else:
            assert torch.equal(found[name], value)
    return found


@pytest.mark.parametrize("forms", [*[[name] for name in QUANTISED], ["q4_k", "q6_k", "fp8"]], ids="-".join)
def test_every_bit_comes_back(forms, tmp_path):
    expected = values(forms)
    content = {"tokenizer.json": b"{}", "generation_config.json": tmp_path / "generation"}
    (tmp_path / "generation").write_text('{"max_new_tokens": 7}')
    fields = FIELDS | {"quantization_config": {"quant_method": "gptq"}}
    write_checkpoint(tmp_path / "out", fields, content, iter(expected.items()))
    assert_same(tmp_path / "out", expected)
    names = {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names
    assert (tmp_path / "out" / "generation_config.json").read_text() == '{"max_new_tokens": 7}'
    assert {path.name for path in tmp_path.iterdir()} == {"out", "generation"}
    stored = load_file(tmp_path / "out" / "model.safetensors")  # the library reads it, too
    first = next(name for name in expected if name.endswith("q_proj.weight"))
    assert torch.equal(stored[first.removesuffix("weight") + "codes"], expected[first].codes)
    assert not any(name.endswith("like") for name in stored)


def test_a_dense_one_says_nothing_of_quantisation(tmp_path):
    expected = {
        name: value.dequantise() if isinstance(value, Weight) else value for name, value in values(["q8_0"]).items()
    }
    write_checkpoint(tmp_path / "out", FIELDS, {}, expected.items())
    assert_same(tmp_path / "out", expected)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_tensors_begin_at_multiples_of_64_bytes(tmp_path):
    """Where the sizes before them are multiples: all of these are."""
    write_checkpoint(tmp_path / "out", FIELDS, {}, values(["q4_k", "int4"]).items())
    content = (tmp_path / "out" / "model.safetensors").read_bytes()
    [length] = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    del header["__metadata__"]
    starts = sorted(entry["data_offsets"][0] for entry in header.values())
    assert not any((8 + length + start) % 64 for start in starts)


@pytest.mark.parametrize("form", QUANTISED)
def test_q_k_and_v_are_joined_without_a_copy(form, tmp_path):
    expected = values([form])
    write_checkpoint(tmp_path / "out", FIELDS, {}, expected.items())
    found = dict(open_checkpoint(tmp_path / "out").tensors(torch.bfloat16))
    names = [f"{LAYER}self_attn.{name}_proj.weight" for name in "qkv"]
    parts = [found[name] for name in names]
    whole = joined(parts)
    assert torch.equal(whole.dequantise(), torch.cat([expected[name].dequantise() for name in names]))
    assert [each.data_ptr() for each in whole.tensors] == [each.data_ptr() for each in parts[0].tensors]
    other_order = joined(parts[::-1])
    assert torch.equal(other_order.dequantise(), torch.cat([part.dequantise() for part in parts[::-1]]))
    assert other_order.tensors[0].data_ptr() not in [part.tensors[0].data_ptr() for part in parts]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not say what is mapped")
@pytest.mark.parametrize("form", ["int4", "q4_k", "fp8"])
def test_a_loaded_model_keeps_the_file_mapped(form, tmp_path):
    byte_library().save(str(tmp_path / "tokenizer.json"))
    files = {"tokenizer.json": tmp_path / "tokenizer.json"}
    write_checkpoint(tmp_path / "out", FIELDS, files, values([form]).items())
    model = Model.from_pretrained(tmp_path / "out", device="cpu", cache_tokens=64)
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    ours = [line[0].split("-") for line in lines if line[-1] == str(tmp_path / "out" / "model.safetensors")]
    [layer] = model.module.model.layers
    for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"):
        for tensor in layer.get_submodule(name).value.tensors:
            place = tensor.data_ptr()
            assert not tensor.numel() or any(int(start, 16) <= place < int(end, 16) for start, end in ours)
    assert model.forward([1, 2, 3]).isfinite().all()


def test_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD", 200_000)
    expected = values(["q5_0", "int8"])
    write_checkpoint(tmp_path / "out", FIELDS, {}, expected.items())
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert_same(tmp_path / "out", expected)


def test_writing_to_a_tensor_leaves_the_file(tmp_path):
    write_checkpoint(tmp_path / "out", FIELDS, {}, values(["q4_k"]).items())
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    for _, value in open_checkpoint(tmp_path / "out").tensors(torch.bfloat16):
        for tensor in value.tensors if isinstance(value, Weight) else [value]:
            tensor.zero_()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("there", ["a file", "a folder", "a link"])
def test_what_exists_is_left_alone(there, tmp_path):
    out = tmp_path / "out"
    if there == "a file":
        out.write_text("mine")
    elif there == "a folder":
        out.mkdir()
    else:
        out.symlink_to("nowhere")

    def weights() -> Iterator[tuple[str, Tensor]]:
        raise AssertionError("the weights were asked for")
        yield

    with pytest.raises(CheckpointError, match="out: exists; expected the name of a new folder"):
        write_checkpoint(out, FIELDS, {}, weights())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_of_what_fails(error, tmp_path):
    def weights() -> Iterator[tuple[str, Tensor | Weight]]:
        yield from list(values(["q4_k"]).items())[:4]
        raise error

    with pytest.raises(error):
        write_checkpoint(tmp_path / "out", FIELDS, {}, weights())
    assert not list(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match="out: cannot be written: No such file or directory"):
        write_checkpoint(tmp_path / "out", FIELDS, {"tokenizer.json": tmp_path / "gone"}, values(["q4_k"]).items())
    assert not list(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match="out: cannot be written: No such file or directory"):
        write_checkpoint(tmp_path / "no" / "out", FIELDS, {}, values(["q4_k"]).items())


# --- what is refused --------------------------------------------------------------------------------------------------

Q = f"{LAYER}self_attn.q_proj"


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def change_config(folder: Path, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"]["formats"])
    (folder / "config.json").write_text(json.dumps(config))


FAULTS = {
    "no scales": (change_tensors, lambda tensors: tensors.pop(f"{Q}.scales"), r"expected codes, scales, .*: scales is"),
    "one too many": (
        change_tensors,
        lambda tensors: tensors.update({f"{Q}.zeros": torch.zeros(1)}),
        r"q_proj has the tensors .*zeros; expected .* of the format q4_k: zeros is wrong",
    ),
    "dense beside": (
        change_tensors,
        lambda tensors: tensors.update({f"{Q}.weight": torch.zeros(256, 256)}),
        "expected .* of the format q4_k: weight is wrong",
    ),
    "a shape": (
        change_tensors,
        lambda tensors: tensors.update({f"{Q}.codes": tensors[f"{Q}.codes"][:8].clone()}),
        r"q_proj must have shape \[256, 256\], and has \[128, 256\]; expected the format q4_k",
    ),
    "another shape": (
        change_tensors,
        lambda tensors: tensors.update({f"{Q}.scales": tensors[f"{Q}.scales"][:8].clone()}),
        r"q_proj\.scales must have shape \[16, 1, 16\], and has \[8, 1, 16\]",
    ),
    "a dtype": (
        change_tensors,
        lambda tensors: tensors.update({f"{Q}.sub_scales": tensors[f"{Q}.sub_scales"].to(torch.int8)}),
        r"q_proj\.sub_scales must be uint8, and is int8",
    ),
    "infinity": (
        change_tensors,
        lambda tensors: tensors[f"{Q}.minima"].view(torch.float16).fill_(torch.inf),
        r"q_proj\.minima has values that are NaN or infinite; expected finite scales",
    ),
    "another format": (change_config, lambda formats: formats.update({Q: "q6_k"}), "expected codes, high, scales, "),
    "an unknown format": (
        change_config,
        lambda formats: formats.update({Q: "q9"}),
        "the format 'q9'; expected one of fp8",
    ),
    "dense": (
        change_config,
        lambda formats: formats.update({Q: "dense"}),
        "the format 'dense'; expected one of fp8, ",
    ),
    "no format": (
        change_config,
        lambda formats: formats.pop(Q),
        "q_proj is quantised, .* the format None; expected one",
    ),
    "a format too many": (
        change_config,
        lambda formats: formats.update({"lm_head": "q4_k"}),
        "gives lm_head the format 'q4_k'; expected its tensors in the weight files, which lack them",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_tensors_that_contradict_the_formats(fault, tmp_path):
    change, how, message = FAULTS[fault]
    write_checkpoint(tmp_path / "out", FIELDS, {}, values(["q4_k"]).items())
    change(tmp_path / "out", how)
    file = r"(model\.safetensors|config\.json)"
    with pytest.raises(CheckpointError, match=rf"{tmp_path}/out/{file}: .*{message}"):
        list(open_checkpoint(tmp_path / "out").tensors(torch.bfloat16))


def test_a_file_that_was_cut_after_its_header_was_read(tmp_path):
    write_checkpoint(tmp_path / "out", FIELDS, {}, values(["q4_k"]).items())
    checkpoint = open_checkpoint(tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100_000])
    with pytest.raises(CheckpointError, match=r"has 100000 bytes; expected \d+, the end of tensor"):
        list(checkpoint.tensors(torch.bfloat16))
