"""GGUF: files that the gguf library writes are read as the library reads them, and damaged files are refused."""

from __future__ import annotations

import os
import re
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("gguf")
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize as oracle

from qwenkern.checkpoint import open_checkpoint
from qwenkern.checkpoint.blocks import format_of
from qwenkern.checkpoint.dequantize import is_float, is_supported
from qwenkern.checkpoint.gguf_container import read_container
from qwenkern.errors import CheckpointError, ConfigError
from qwenkern.generation import Generation
from qwenkern.hub import names
from qwenkern.kernels import Weight
from qwenkern.kernels.weights import joined

Q, V = GGMLQuantizationType, GGUFValueType
HIDDEN, FFN, KV, VOCAB = 256, 512, 64, 40
NUMBERS = {
    "block_count": 1,
    "context_length": 512,
    "embedding_length": HIDDEN,
    "feed_forward_length": FFN,
    "attention.head_count": 8,
    "attention.head_count_kv": 2,
}
# llama.cpp's name -> Hugging Face's, shape in torch's order
LAYER = {
    "attn_norm.weight": ("input_layernorm.weight", (HIDDEN,)),
    "attn_q.weight": ("self_attn.q_proj.weight", (HIDDEN, HIDDEN)),
    "attn_q.bias": ("self_attn.q_proj.bias", (HIDDEN,)),
    "attn_k.weight": ("self_attn.k_proj.weight", (KV, HIDDEN)),
    "attn_k.bias": ("self_attn.k_proj.bias", (KV,)),
    "attn_v.weight": ("self_attn.v_proj.weight", (KV, HIDDEN)),
    "attn_v.bias": ("self_attn.v_proj.bias", (KV,)),
    "attn_output.weight": ("self_attn.o_proj.weight", (HIDDEN, HIDDEN)),
    "ffn_norm.weight": ("post_attention_layernorm.weight", (HIDDEN,)),
    "ffn_gate.weight": ("mlp.gate_proj.weight", (FFN, HIDDEN)),
    "ffn_up.weight": ("mlp.up_proj.weight", (FFN, HIDDEN)),
    "ffn_down.weight": ("mlp.down_proj.weight", (HIDDEN, FFN)),
}
NAMES = {
    "token_embd.weight": ("model.embed_tokens.weight", (VOCAB, HIDDEN)),
    "output_norm.weight": ("model.norm.weight", (HIDDEN,)),
    **{f"blk.0.{name}": (f"model.layers.0.{theirs}", shape) for name, (theirs, shape) in LAYER.items()},
}


def write_model(
    path: Path, kind: Q = Q.F32, extra=lambda writer: None, names=NAMES, numbers=NUMBERS, others=None, **options
) -> dict:
    """A tiny model, its matrices in `kind`, and some by their names in `others`. Returns llama.cpp's name -> the bytes
    that were written and their type."""
    random = np.random.default_rng(0)
    writer = GGUFWriter(path, "qwen2", **options)
    for key, value in numbers.items():
        writer.add_uint32(f"qwen2.{key}", value)
    writer.add_float32("qwen2.attention.layer_norm_rms_epsilon", 1e-6)
    extra(writer)
    written = {}
    for name, (_, shape) in names.items():
        stored = (others or {}).get(name, kind) if len(shape) == 2 else Q.F32
        block_size, type_size = GGML_QUANT_SIZES[stored]
        data = random.integers(0, 60, (*shape[:-1], shape[-1] // block_size * type_size), dtype=np.uint8)
        writer.add_tensor(name, data, raw_dtype=stored)
        written[name] = (data, stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


# --- files that are right ---------------------------------------------------------------------------------------------


def matrix(tensor: torch.Tensor | Weight) -> torch.Tensor:
    """The values of what a checkpoint yields."""
    return tensor if isinstance(tensor, torch.Tensor) else tensor.dequantise()


@pytest.mark.parametrize(
    "kind", [kind for kind in Q if is_supported(kind) and HIDDEN % GGML_QUANT_SIZES[kind][0] == 0], ids=lambda k: k.name
)
def test_a_model_of_each_type_is_what_the_gguf_library_reads(kind, tmp_path, caplog):
    written = write_model(tmp_path / "tiny.gguf", kind)
    checkpoint = open_checkpoint(tmp_path / "tiny.gguf")
    assert checkpoint.config.tie_word_embeddings
    assert (checkpoint.config.vocab_size, checkpoint.config.head_dim) == (VOCAB, 32)
    assert checkpoint.generation == Generation(source="tiny.gguf")
    tensors = dict(checkpoint.tensors(torch.float32))
    assert sorted(tensors) == sorted(theirs for theirs, _ in NAMES.values())
    for name, (theirs, shape) in NAMES.items():
        data, stored = written[name]
        expected = torch.from_numpy(oracle(data, stored).copy())
        assert tensors[theirs].shape == shape == checkpoint.shapes[theirs]
        assert torch.equal(matrix(tensors[theirs]), expected), name
        plan = checkpoint.formats.get(theirs)
        fits = stored == kind and format_of(kind) is not None and shape[0] % 16 == 0
        assert isinstance(tensors[theirs], Weight) == (plan is not None) == fits, name
        if plan is not None:
            assert (plan.format, plan.nbytes) == (kind.name.lower(), tensors[theirs].nbytes)
            assert [each.shape for each in plan.tensors] == [each.shape for each in tensors[theirs].tensors]
    dense = [name for name, (_, shape) in NAMES.items() if len(shape) == 2 and NAMES[name][0] not in checkpoint.formats]
    warning = f"{len(dense)} quantised matrices \\(model.embed_tokens.weight of {kind.name} and the like\\) are dequant"
    assert bool(re.search(warning, caplog.text)) == (not is_float(kind))
    assert checkpoint.num_bytes(torch.float32) == sum(tensor.nbytes for tensor in tensors.values())
    assert dict(checkpoint.tensors(torch.bfloat16))["model.norm.weight"].dtype == torch.bfloat16
    caplog.clear()
    dense = dict(checkpoint.tensors(torch.float32, dense=True))
    assert not caplog.text
    assert all(torch.equal(dense[name], matrix(tensor)) for name, tensor in tensors.items())
    assert checkpoint.num_bytes(torch.float32, dense=True) == sum(tensor.nbytes for tensor in dense.values())


@pytest.mark.parametrize("order", [NAMES, dict(reversed(NAMES.items()))], ids=["in order", "reversed"])
def test_q_k_and_v_are_joined_without_a_copy(order, tmp_path):
    write_model(tmp_path / "tiny.gguf", Q.Q5_K, names=order)
    found = dict(open_checkpoint(tmp_path / "tiny.gguf").tensors(torch.float32))
    for joins in (["self_attn.q", "self_attn.k", "self_attn.v"], ["mlp.gate", "mlp.up"]):
        parts = [found[f"model.layers.0.{name}_proj.weight"] for name in joins]
        whole = joined(parts)
        assert torch.equal(whole.dequantise(), torch.cat([part.dequantise() for part in parts]))
        assert [each.data_ptr() for each in whole.tensors] == [each.data_ptr() for each in parts[0].tensors]


def test_parts_of_other_formats_are_not_in_the_way(tmp_path):
    written = write_model(tmp_path / "tiny.gguf", Q.Q4_0, others={"blk.0.attn_k.weight": Q.Q8_0})
    found = dict(open_checkpoint(tmp_path / "tiny.gguf").tensors(torch.float32))
    whole = joined([found[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "qkv"])
    assert whole.format == "q4_0+q8_0+q4_0"
    expected = [oracle(*written[f"blk.0.attn_{name}.weight"]) for name in "qkv"]
    assert torch.equal(whole.dequantise(), torch.from_numpy(np.concatenate(expected)))


def test_output_weight_is_an_untied_lm_head(tmp_path):
    write_model(tmp_path / "tiny.gguf", names=NAMES | {"output.weight": ("lm_head.weight", (VOCAB, HIDDEN))})
    checkpoint = open_checkpoint(tmp_path / "tiny.gguf")
    assert not checkpoint.config.tie_word_embeddings
    assert "lm_head.weight" in dict(checkpoint.tensors(torch.bfloat16))


def test_metadata_of_every_type(tmp_path):
    expected = {
        "a.uint8": 255,
        "a.int8": -128,
        "a.uint16": 65535,
        "a.int16": -32768,
        "a.uint32": 2**32 - 1,
        "a.int32": -(2**31),
        "a.uint64": 2**64 - 1,
        "a.int64": -(2**63),
        "a.float32": 0.5,
        "a.float64": 0.1,
        "a.bool": True,
        "a.string": "naïve 字",
        "a.strings": ["", "Ġthe", "字", "x" * 300],
        "a.ints": [-1, 2, 3],
        "a.floats": [0.5, -2.0],
        "a.bools": [True, False],
    }

    def extra(writer):
        for key, value in expected.items():
            kind = key.removeprefix("a.")
            getattr(writer, f"add_{kind}" if hasattr(writer, f"add_{kind}") else "add_array")(key, value)

    write_model(tmp_path / "tiny.gguf", extra=extra)
    metadata = open_checkpoint(tmp_path / "tiny.gguf").metadata
    found = {key: value for key, value in metadata.items() if key.startswith("a.")}
    assert found == expected
    assert {key: type(value) for key, value in found.items()} == {key: type(v) for key, v in expected.items()}
    assert [type(value) for value in found["a.bools"]] == [bool, bool]


def test_generation_settings_come_from_the_metadata(tmp_path):
    def extra(writer):
        writer.add_eos_token_id(7)
        writer.add_eot_token_id(9)
        writer.add_float32("general.sampling.temp", 0.5)
        writer.add_int32("general.sampling.top_k", 20)
        writer.add_float32("general.sampling.top_p", 0.75)
        writer.add_float32("general.sampling.min_p", 0.25)
        writer.add_float32("general.sampling.penalty_repeat", 1.125)

    write_model(tmp_path / "tiny.gguf", extra=extra)
    generation = open_checkpoint(tmp_path / "tiny.gguf").generation
    assert generation.end_ids == {7, 9}
    assert generation.sampling == {
        "temperature": 0.5,
        "top_k": 20,
        "top_p": 0.75,
        "min_p": 0.25,
        "repetition_penalty": 1.125,
    }


def test_another_alignment(tmp_path):
    write_model(tmp_path / "tiny.gguf", Q.Q6_K, extra=lambda writer: writer.add_custom_alignment(256))
    theirs = {tensor.name: tensor.data_offset for tensor in GGUFReader(tmp_path / "tiny.gguf").tensors}
    ours = read_container(tmp_path / "tiny.gguf").tensors
    assert {name: info.offset for name, info in ours.items()} == theirs


@pytest.mark.parametrize("name", ["TINY.GGUF", "tiny.Gguf", "sha256-1234", "tiny", "tiny.bin", "tiny.gguf.part"])
def test_a_file_of_any_name_is_known_by_its_first_bytes(name, tmp_path):
    write_model(tmp_path / name)
    assert open_checkpoint(tmp_path / name).config.vocab_size == VOCAB
    assert names.resolve(str(tmp_path / name)) == tmp_path / name


# --- models in parts --------------------------------------------------------------------------------------------------


def write_parts(folder: Path, name: str = "tiny.gguf", **options) -> list[Path]:
    """The same model by the gguf library's own splitting; some of its tensors in each part."""
    folder.mkdir(exist_ok=True)
    write_model(folder / name, Q.Q4_K, split_max_tensors=5, **options)
    return sorted(folder.glob("*-of-*"))


@pytest.mark.parametrize("ending", ["gguf", "GGUF"])
@pytest.mark.parametrize("small_first_shard", [False, True])
@pytest.mark.parametrize("given", [0, 1, 2])
def test_any_part_of_a_model_loads_all_of_it(given, small_first_shard, ending, tmp_path):
    whole = tmp_path / "whole.gguf"
    write_model(whole, Q.Q4_K)
    parts = write_parts(tmp_path / "parts", small_first_shard=small_first_shard)
    assert len(parts) == 3 + small_first_shard
    assert parts[0].name == f"tiny-00001-of-0000{len(parts)}.gguf"
    parts = [part.rename(part.with_suffix(f".{ending}")) for part in parts]
    ours, expected = open_checkpoint(parts[given]), open_checkpoint(whole)
    assert replace(ours.config, source="") == replace(expected.config, source="")
    assert ours.shapes == expected.shapes
    assert {k for k in ours.metadata if not k.startswith("split.")} == set(expected.metadata)
    theirs = dict(expected.tensors(torch.float32))
    found = dict(ours.tensors(torch.float32))
    assert found.keys() == theirs.keys()
    assert all(torch.equal(matrix(found[name]), matrix(theirs[name])) for name in theirs)


def test_missing_parts_are_named(tmp_path):
    first, second, third = write_parts(tmp_path)
    first.unlink()
    third.unlink()
    message = r"00002-of-00003\.gguf: is part 2 of the 3 .*: tiny-00001-of-00003\.gguf, tiny-00003-of-00003\.gguf; exp"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(second)


def test_a_part_under_another_name_is_refused(tmp_path):
    first, second, third = write_parts(tmp_path)
    second.rename(tmp_path / "renamed.gguf")
    with pytest.raises(CheckpointError, match=r"renamed\.gguf: is part 2 of the 3 of a model; expected a name"):
        open_checkpoint(tmp_path / "renamed.gguf")
    third.rename(second)
    (tmp_path / "renamed.gguf").rename(third)
    with pytest.raises(CheckpointError, match=r"00002-of-00003\.gguf: split\.no is 2; expected 1, as its name"):
        open_checkpoint(first)


def test_a_part_of_another_model_is_refused(tmp_path):
    first, second, _ = write_parts(tmp_path)
    other = tmp_path / "other"
    more = NAMES | {"output.weight": ("lm_head.weight", (VOCAB, HIDDEN))}
    (part := write_parts(other, names=more)[1]).replace(second)
    assert not part.exists()
    with pytest.raises(CheckpointError, match=r"00002-of-00003\.gguf: split\.tensors\.count is 15; expected 14"):
        open_checkpoint(first)
    shuffled = dict(reversed(NAMES.items()))
    write_parts(other, names=shuffled)[1].replace(second)
    with pytest.raises(CheckpointError, match=r"tensor .* is also in tiny-0000[12]-of-00003\.gguf; expected it in one"):
        open_checkpoint(first)


def test_metadata_of_a_later_part_must_agree(tmp_path):
    def part(number: int, name: str, more: list[bytes], total: int = 2) -> None:
        split = [
            key_value("split.no", V.UINT16, struct.pack("<H", number)),
            key_value("split.count", V.UINT16, struct.pack("<H", 2)),
            key_value("split.tensors.count", V.INT32, struct.pack("<i", total)),
        ]
        raw = container([*split, *more], [tensor(name, [8])], bytes(64))
        (tmp_path / f"x-0000{number + 1}-of-00002.gguf").write_bytes(raw)

    part(0, "a", [QWEN2])
    part(1, "b", [LLAMA])
    with pytest.raises(CheckpointError, match=r"x-00002.*general\.architecture is 'llama'; expected 'qwen2', as its"):
        open_checkpoint(tmp_path / "x-00001-of-00002.gguf")
    part(0, "a", [QWEN2], total=3)
    part(1, "b", [], total=3)
    with pytest.raises(
        CheckpointError, match=r"x-00001.*: split\.tensors\.count is 3, and the 2 parts have 2; expected"
    ):
        open_checkpoint(tmp_path / "x-00002-of-00002.gguf")
    part(0, "a", [QWEN2])
    part(1, "b", [])
    with pytest.raises(CheckpointError, match=r"unknown tensor a; expected llama\.cpp's names"):
        open_checkpoint(tmp_path / "x-00001-of-00002.gguf")


@pytest.mark.parametrize("follow", [False, True])
def test_parts_that_are_links_elsewhere(follow, tmp_path, monkeypatch):
    first, second, _ = write_parts(tmp_path / "model")
    second.rename(tmp_path / "secret")
    second.symlink_to(tmp_path / "secret")
    if follow:
        monkeypatch.setenv("QWENKERN_FOLLOW_LINKS", "1")
        assert len(open_checkpoint(first).shapes) == 14
    else:
        with pytest.raises(CheckpointError, match=r"00002-of-00003\.gguf: is a link to .*secret, outside of .*model"):
            open_checkpoint(first)


# --- models that are not ours -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            lambda w: (w.add_uint16("split.count", 3), w.add_uint16("split.no", 1)),
            r"part 2 of the 3 of a model; expected a name that ends in -00002-of-00003\.gguf.*llama-gguf-split --merge",
        ),
        (lambda w: (w.add_uint16("split.count", 3), w.add_uint16("split.no", 3)), r"split.no is 3 and split.count 3"),
        (lambda w: w.add_string("split.count", "3"), r"split.no is 0 and split.count '3'"),
        (lambda w: w.add_array("split.count", [3]), r"split.no is 0 and split.count \[3\]"),
        (lambda w: w.add_int32("split.count", -1), r"split.no is 0 and split.count -1"),
        (
            lambda w: w.add_uint64("split.count", 2**63),
            r"part 1 of the 9223372036854775808 of a model; expected a name",
        ),
    ],
)
def test_metadata_that_is_refused(extra, message, tmp_path):
    write_model(tmp_path / "tiny.gguf", extra=extra)
    with pytest.raises(CheckpointError, match=rf"tiny\.gguf: .*{message}"):
        open_checkpoint(tmp_path / "tiny.gguf")


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("rope_freqs.weight", (16,), r"tensor rope_freqs\.weight scales rotary frequencies one by one"),
        ("blk.0.attn_q_norm.weight", (32,), r"unknown tensor blk\.0\.attn_q_norm\.weight"),
        ("blk.00.attn_q.weight", (HIDDEN, HIDDEN), r"unknown tensor blk\.00\.attn_q\.weight"),
        ("blk.1.attn_q.weight", (HIDDEN, HIDDEN), r"unknown tensor model\.layers\.1\.self_attn\.q_proj\.weight"),
        ("token_embd.bias", (HIDDEN,), r"unknown tensor model\.embed_tokens\.bias"),
        ("attn_q.weight", (HIDDEN, HIDDEN), r"unknown tensor attn_q\.weight"),
    ],
)
def test_tensors_that_are_refused(name, shape, message, tmp_path):
    write_model(tmp_path / "tiny.gguf", names=NAMES | {name: ("", shape)})
    with pytest.raises(CheckpointError, match=rf"tiny\.gguf: {message}"):
        open_checkpoint(tmp_path / "tiny.gguf")


def test_missing_tensors_and_wrong_shapes_are_found_before_any_weight_is_read(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_model(path, names={name: NAMES[name] for name in NAMES if name != "token_embd.weight"})
    with pytest.raises(CheckpointError, match=r"tiny\.gguf: has no tensor token_embd\.weight"):
        open_checkpoint(path)
    write_model(path, names={name: NAMES[name] for name in NAMES if name != "output_norm.weight"})
    with pytest.raises(CheckpointError, match=r"1 of 14 tensors are missing: model\.norm\.weight"):
        open_checkpoint(path)
    write_model(path, numbers=NUMBERS | {"feed_forward_length": 768})
    with pytest.raises(CheckpointError, match=r"gate_proj\.weight has shape \(512, 256\); expected \(768, 256\)"):
        open_checkpoint(path)
    write_model(path, numbers=NUMBERS | {"block_count": 900})
    with pytest.raises(CheckpointError, match=r"has 14 tensors; expected those of a model of 900 layers"):
        open_checkpoint(path)
    write_model(path, numbers={key: NUMBERS[key] for key in NUMBERS if key != "context_length"})
    with pytest.raises(ConfigError, match=r"tiny\.gguf: context_length is missing"):
        open_checkpoint(path)


def test_a_type_without_dequantization_is_refused_at_once(tmp_path):
    write_model(tmp_path / "tiny.gguf", Q.Q8_K)
    with pytest.raises(
        CheckpointError, match=r"tensor token_embd\.weight has type Q8_K; expected one of BF16, F16, F32"
    ):
        open_checkpoint(tmp_path / "tiny.gguf")


@pytest.mark.parametrize("dense", [False, True])
def test_scales_that_are_not_finite_are_refused(dense, tmp_path):
    write_model(tmp_path / "tiny.gguf", Q.Q5_0)
    container = read_container(tmp_path / "tiny.gguf")
    at = container.tensors["blk.0.ffn_up.weight"].offset + 22 * 1001
    content = bytearray((tmp_path / "tiny.gguf").read_bytes())
    content[at : at + 2] = np.array([np.nan], np.float16).tobytes()
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"bad\.gguf: tensor blk\.0\.ffn_up\.weight: Q5_0 blocks with scales that"
    ):
        list(open_checkpoint(tmp_path / "bad.gguf").tensors(torch.float32, dense))


# --- files that are wrong: written by hand ----------------------------------------------------------------------------


def string(text: str | bytes) -> bytes:
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw


def key_value(key: str | bytes, kind: int, payload: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + payload


def tensor(name: str | bytes, dims: list[int], kind: int = Q.F32, offset: int = 0, n_dims: int | None = None) -> bytes:
    count = len(dims) if n_dims is None else n_dims
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", count, *dims, kind, offset)


def container(key_values=(), tensors=(), data=b"", version=3, magic=b"GGUF", counts=None) -> bytes:
    num_tensors, num_key_values = counts or (len(tensors), len(key_values))
    raw = struct.pack("<4sIQQ", magic, version, num_tensors, num_key_values) + b"".join([*key_values, *tensors])
    return raw + bytes(-len(raw) % 32) + data


QWEN2 = key_value("general.architecture", V.STRING, string("qwen2"))
LLAMA = key_value("general.architecture", V.STRING, string("llama"))
A = tensor("a", [8])
HUGE = 2**63
BAD = {
    "empty file": (b"", r"cannot be read: .*empty"),
    "half a magic": (b"GG", r"the header needs 24 bytes, 2 are left; the file is truncated"),
    "half a header": (container()[:20], r"the header needs 24 bytes, 20 are left"),
    "magic": (container(magic=b"GGML"), r"begins with b'GGML'; expected b'GGUF'"),
    "version 1": (container(version=1), r"GGUF version 1; expected 2 or 3"),
    "version 4": (container(version=4), r"GGUF version 4; expected 2 or 3"),
    "big endian": (container(version=3 << 24), r"version 50331648 \(a big-endian file\); expected 2 or 3"),
    "huge tensor count": (container(counts=(HUGE, 0)), r"its key-values and tensors needs \d+ bytes, 8 are left"),
    "huge key-value count": (container(counts=(0, HUGE)), r"its key-values and tensors needs \d+ bytes, 8 are left"),
    "key beyond the file": (
        container([struct.pack("<Q", 10**12) + b"key" + bytes(20)]),
        r"a key: a string of 1000000000000 bytes does not fit into the remaining \d+",
    ),
    "value one byte beyond the file": (
        container([key_value("k", V.STRING, string("x" * 19))])[:-1],
        r"the value of 'k': a string of 19 bytes does not fit into the remaining 18",
    ),
    "huge key": (container([struct.pack("<Q", 2**64 - 1) + bytes(30)]), r"a string of 18446744073709551615 bytes"),
    "key not UTF-8": (
        container([key_value(b"\xff\xfe", V.UINT8, b"\1")]),
        r"a key: the string at byte 32 is not UTF-8",
    ),
    "value not UTF-8": (
        container([key_value("name", V.STRING, string(b"ab\xff"))]),
        r"the value of 'name': the string at byte 48 is not UTF-8",
    ),
    "key twice": (container([QWEN2, QWEN2]), r"key 'general\.architecture' occurs twice"),
    "value type": (container([key_value("k", 13, bytes(8))]), r"key 'k' has unknown value type 13"),
    "element type": (
        container([key_value("k", V.ARRAY, struct.pack("<IQ", 99, 1) + bytes(8))]),
        r"key 'k' has unknown value type 99",
    ),
    "array of arrays": (
        container([key_value("k", V.ARRAY, struct.pack("<IQ", V.ARRAY, 1) + bytes(16))]),
        r"key 'k' holds an array of arrays",
    ),
    "value beyond the file": (
        container([key_value("k", V.UINT64, b"")])[:38],
        r"the value of 'k' needs 8 bytes, 1 are left",
    ),
    "huge array of numbers": (
        container([key_value("k", V.ARRAY, struct.pack("<IQ", V.INT32, HUGE))]),
        r"key 'k' holds an array of 9223372036854775808 elements; expected at most 2097152",
    ),
    "huge array of strings": (
        container([key_value("k", V.ARRAY, struct.pack("<IQ", V.STRING, 2**64 - 1))]),
        r"key 'k' holds an array of 18446744073709551615 elements; expected at most 2097152",
    ),
    "array beyond the file": (
        container([key_value("k", V.ARRAY, struct.pack("<IQ", V.INT32, 1 << 21))]),
        r"the value of 'k' needs 8388608 bytes, \d+ are left; the file is truncated or damaged",
    ),
    "strings beyond the file": (
        container([key_value("k", V.ARRAY, struct.pack("<IQ", V.STRING, 1 << 21))]),
        r"the value of 'k' needs 16777216 bytes, \d+ are left; the file is truncated or damaged",
    ),
    "arrays in arrays in arrays": (
        container([key_value("k", V.ARRAY, struct.pack("<IQ", V.ARRAY, 1) * 1000)]),
        r"key 'k' holds an array of arrays",
    ),
    "name of 65 bytes": (
        container((), [tensor("a" * 65, [8])], bytes(64)),
        r"name has 65 characters; expected at most",
    ),
    "key of 100,000 bytes, twice": (
        container([key_value("k" * 100_000, V.UINT8, b"\0")] * 2),
        r"key 'k{400,}\.\.\. \(header",
    ),
    "array of strings that ends early": (
        container([key_value("k", V.ARRAY, struct.pack("<IQ", V.STRING, 2) + string("x" * 30))])[:87],
        r"ends at byte 87, inside the value of 'k'; the file is truncated",
    ),
    "bool of 2": (container([key_value("k", V.BOOL, b"\2")]), r"the value of 'k' has a bool of 2; expected 0 or 1"),
    "alignment 0": (
        container([key_value("general.alignment", V.UINT32, struct.pack("<I", 0))]),
        r"general\.alignment is 0; expected a power of two",
    ),
    "alignment 24": (
        container([key_value("general.alignment", V.UINT32, struct.pack("<I", 24))]),
        r"general\.alignment is 24; expected a power of two",
    ),
    "alignment's type": (
        container([key_value("general.alignment", V.STRING, string("32"))]),
        r"general\.alignment has type STRING; expected UINT32",
    ),
    "tensor twice": (container((), [A, tensor("a", [8], offset=32)], bytes(64)), r"tensor a occurs twice"),
    "tensor name not UTF-8": (container((), [tensor(b"\xc3(", [8])], bytes(32)), r"a tensor's name: .* is not UTF-8"),
    "no dimensions": (container((), [tensor("a", [])], bytes(64)), r"tensor a has 0 dimensions; expected 1 to 4"),
    "five dimensions": (
        container((), [tensor("a", [1] * 5)], bytes(64)),
        r"tensor a has 5 dimensions; expected 1 to 4",
    ),
    "2**32 - 1 dimensions": (
        container((), [tensor("a", [1], n_dims=2**32 - 1)], bytes(64)),
        r"tensor a has 4294967295 dimensions",
    ),
    "a dimension of 0": (container((), [tensor("a", [8, 0])], bytes(64)), r"has shape \(0, 8\); expected positive"),
    "a negative dimension": (
        container((), [tensor("a", [8, 2**64 - 1])], bytes(64)),
        r"has shape \(18446744073709551615, 8\); expected positive 63-bit",
    ),
    "dimensions whose product overflows": (
        container((), [tensor("a", [2**32, 2**32])], bytes(64)),
        r"tensor a of 73786976294838206464 bytes at 96 does not fit",
    ),
    "tensor type": (container((), [tensor("a", [8], 999)], bytes(64)), r"tensor a has unknown type 999"),
    "part of a block": (
        container((), [tensor("a", [48], Q.Q8_0)], bytes(64)),
        r"tensor a has rows of 48; Q8_0 needs a multiple of 32",
    ),
    "tensor beyond the file": (
        container((), [tensor("a", [17])], bytes(64)),
        r"tensor a of 68 bytes at 64 does not fit in the file of 128; the file is truncated",
    ),
    "offset beyond the file": (
        container((), [tensor("a", [8], offset=2**40)], bytes(64)),
        r"tensor a of 32 bytes at \d+ does not fit",
    ),
    "misaligned": (
        container((), [tensor("a", [8], offset=4)], bytes(64)),
        r"tensor a begins at offset 4; expected a multiple of 32",
    ),
    "overlap": (
        container((), [tensor("a", [9]), tensor("b", [8], offset=32)], bytes(64)),
        r"tensors a and b overlap at byte",
    ),
    "more blocks than its shape": (
        container((), [tensor("a", [8]), tensor("b", [8], offset=64)], bytes(128)),
        r"tensor a \[8\] of F32 takes 32 bytes from \d+ on; expected the next, b, at the next multiple of 32, and",
    ),
    "the same bytes twice": (container((), [A, tensor("b", [8])], bytes(64)), r"tensors a and b overlap"),
    "another architecture": (container([LLAMA]), r"general\.architecture is 'llama'; expected 'qwen2'"),
    "no architecture": (container(), r"general\.architecture is None; expected 'qwen2'"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused(name, tmp_path):
    raw, message = BAD[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=rf"bad\.gguf: .*{message}"):
        open_checkpoint(path)


ZEROS = 40 << 30  # bytes of a hole after the header: they take no room on the disk
LARGE = {
    "a string": (key_value("k", V.STRING, struct.pack("<Q", 1 << 34)), "a string of 17179869184 bytes does not fit"),
    "a key": (
        struct.pack("<Q", 1 << 34),
        "a key: a string of 17179869184 bytes does not fit into the remaining .* of the 67108864",
    ),
    "bytes": (key_value("k", V.ARRAY, struct.pack("<IQ", V.UINT8, 1 << 34)), "an array of 17179869184 elements"),
    "strings": (key_value("k", V.ARRAY, struct.pack("<IQ", V.STRING, 1 << 30)), "an array of 1073741824 elements"),
}


@pytest.mark.parametrize("name", LARGE)
def test_a_file_that_is_mostly_a_hole_takes_no_memory(name, tmp_path):
    start, message = LARGE[name]
    path = tmp_path / "hole.gguf"
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + start)
    os.truncate(path, ZEROS)
    with pytest.raises(CheckpointError, match=rf"hole\.gguf: .*{message}"):
        read_container(path)


@pytest.mark.parametrize("counts", [(1 << 20, 0), (0, 1 << 20), (1 << 20, 1 << 20)])
def test_counts_that_only_a_hole_could_hold(counts, tmp_path):
    path = tmp_path / "hole.gguf"
    path.write_bytes(container(counts=counts))
    os.truncate(path, ZEROS)
    with pytest.raises(
        CheckpointError, match=r"hole\.gguf: .*(expected at most 65536|67108864 that a header may have)"
    ):
        read_container(path)


@pytest.mark.parametrize("version", [2, 3])
def test_the_same_bytes_without_the_damage_are_read(version, tmp_path):
    tensors = [tensor("a", [8]), tensor("b", [32, 2], Q.Q8_0, offset=32)]
    path = tmp_path / "good.gguf"
    path.write_bytes(container([QWEN2], tensors, bytes(range(100)), version=version))
    found = read_container(path)
    assert found.metadata == {"general.architecture": "qwen2"}
    assert found.tensors["b"].shape == (2, 32)
    assert found.blocks(found.tensors["a"]).tolist() == list(range(32))
    assert found.blocks(found.tensors["b"]).tolist() == list(range(32, 100))
    assert not found.blocks(found.tensors["a"]).flags.writeable


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A tiny model's bytes, where its data begin, and a path for damaged copies."""
    path = tmp_path_factory.mktemp("damage") / "tiny.gguf"

    def extra(writer):
        writer.add_token_list(["a", "Ġb", "字"])
        writer.add_array("tokenizer.ggml.token_type", [1, 1, 3])
        writer.add_eos_token_id(2)

    write_model(path, Q.Q4_K, extra=extra)
    first = min(info.offset for info in read_container(path).tensors.values())
    return path.read_bytes(), first, path


@settings(max_examples=400)
@given(data=st.data())
def test_no_damage_to_the_header_gets_past_our_errors(whole, data):
    raw, first, path = whole
    damaged = bytearray(raw)
    for _ in range(data.draw(st.integers(0, 3))):
        damaged[data.draw(st.integers(0, first - 1))] = data.draw(st.integers(0, 255))
    length = data.draw(st.one_of(st.just(len(raw)), st.integers(0, first + 100)))
    path.write_bytes(damaged[:length])
    try:
        checkpoint = open_checkpoint(path)
        outcome = [tuple(tensor.shape) for _, tensor in checkpoint.tensors(torch.bfloat16)]
    except (CheckpointError, ConfigError) as error:
        outcome = str(error)
    assert outcome == [shape for _, shape in NAMES.values()] or "tiny.gguf" in outcome


# --- the real thing ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.demo
def test_the_demo_model_is_what_the_gguf_library_reads(demo_path):
    checkpoint = open_checkpoint(demo_path)
    assert (checkpoint.config.num_hidden_layers, checkpoint.config.hidden_size) == (24, 896)
    assert checkpoint.config.tie_word_embeddings is False
    assert checkpoint.generation.end_ids == {151645}
    assert len(checkpoint.metadata["tokenizer.ggml.tokens"]) == checkpoint.config.vocab_size == 151936
    assert checkpoint.metadata["tokenizer.ggml.merges"][:2] == ["Ġ Ġ", "ĠĠ ĠĠ"]
    wanted = {
        "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
        "blk.3.attn_q.weight": "model.layers.3.self_attn.q_proj.weight",
        "blk.9.attn_v.weight": "model.layers.9.self_attn.v_proj.weight",
        "blk.23.attn_k.bias": "model.layers.23.self_attn.k_proj.bias",
        "output_norm.weight": "model.norm.weight",
    }
    container = read_container(demo_path)
    infos = {theirs: container.tensors[name] for name, theirs in wanted.items()}
    ours = {name: tensor for name, tensor in checkpoint.tensors(torch.float32) if name in infos}
    for theirs, info in infos.items():
        expected = oracle(container.blocks(info), info.kind).reshape(info.shape)
        assert np.array_equal(matrix(ours[theirs]).numpy(), expected), theirs
        assert float(matrix(ours[theirs]).abs().max()) < 1000
