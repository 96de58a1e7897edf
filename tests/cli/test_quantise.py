"""`qwenkern quantize`: its file loads as the same model that quantize= makes, and it overwrites nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("gguf")
from gguf import GGMLQuantizationType as Q
from support.models import TINY, save_checkpoint, tiny_model
from support.toy_gguf import write_gguf
from support.toy_tokenizer import END
from typer.testing import CliRunner

from qwenkern import Config, Model, RequestError, YarnScaling
from qwenkern.checkpoint import open_checkpoint
from qwenkern.cli.as_folder import config_fields, small_files
from qwenkern.cli.commands import app
from qwenkern.cli.quantising import quantise
from qwenkern.conversion import CHOICES
from qwenkern.generation import Generation
from qwenkern.kernels import Weight
from qwenkern.kernels.weights.integers import Int8

CONFIG = replace(TINY, vocab_size=512, hidden_size=256, intermediate_size=256, num_attention_heads=8)
PROMPT = [7, 3, 300, 41]


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("dense")
    save_checkpoint(tiny_model(CONFIG, torch.bfloat16), path)
    return path


@pytest.mark.parametrize("to", CHOICES)
def test_it_writes_what_quantize_makes(to, dense, tmp_path):
    seen: list[tuple[int, int]] = []
    written = quantise(str(dense), tmp_path / "out", to, lambda what, done, total: seen.append((done, total)))
    checkpoint = open_checkpoint(tmp_path / "out")
    assert {weight.format for weight in checkpoint.formats.values()} == {to, "int8" if to == "int4" else to}
    assert len(checkpoint.formats) == 2 + 7 * CONFIG.num_hidden_layers
    assert seen[-1] == (written.before, written.before)
    assert written.after == checkpoint.num_bytes(torch.bfloat16)
    assert not written.dense
    ours, expected = (
        Model.from_pretrained(path, device="cpu", cache_tokens=512, quantize=quantize)
        for path, quantize in ((tmp_path / "out", None), (dense, to))
    )
    state = expected.module.state_dict()
    assert ours.module.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in ours.module.state_dict().items())
    assert ours.tokenizer.encode("Hello") == expected.tokenizer.encode("Hello")


def test_the_error_is_that_of_the_values(dense, tmp_path):
    written = quantise(str(dense), tmp_path / "out", "int4")
    exact = dict(open_checkpoint(dense).tensors(torch.float32))
    rounded = open_checkpoint(tmp_path / "out").tensors(torch.float32)
    pairs = [(exact[name], each.dequantise()) for name, each in rounded if isinstance(each, Weight)]
    lost = sum(float((a - b).square().sum()) for a, b in pairs)
    assert written.error == pytest.approx(lost / sum(float(a.square().sum()) for a, _ in pairs), rel=1e-4)
    assert 0.001 < written.error < 0.05


def test_q_k_and_v_lie_one_after_the_other(dense, tmp_path):
    quantise(str(dense), tmp_path / "out", "int4")
    with open(tmp_path / "out" / "model.safetensors", "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    for layer in range(CONFIG.num_hidden_layers):
        starts = [header[f"model.layers.{layer}.self_attn.{part}_proj.codes"]["data_offsets"] for part in "qkv"]
        assert starts[0][1] == starts[1][0]
        assert starts[1][1] == starts[2][0]


@pytest.mark.parametrize("kind", [Q.BF16, Q.F16, Q.Q6_K], ids=lambda kind: kind.name)
def test_a_gguf_file_becomes_a_folder(kind, tmp_path):
    write_gguf(tmp_path / "toy.gguf", CONFIG, kind)
    given = open_checkpoint(tmp_path / "toy.gguf")
    written = quantise(str(tmp_path / "toy.gguf"), tmp_path / "out", "int8")
    assert written.twice == (["q6_k"] if kind == Q.Q6_K else [])
    assert written.before == given.num_bytes(torch.bfloat16)
    checkpoint = open_checkpoint(tmp_path / "out")
    same = {"source": "", "quantization": None}
    assert replace(checkpoint.config, **same) == replace(given.config, **same)
    assert checkpoint.generation.end_ids == given.generation.end_ids == {END}
    found, exact = dict(checkpoint.tensors(torch.float32)), dict(given.tensors(torch.float32, dense=True))
    assert found.keys() == exact.keys()
    for name, tensor in exact.items():
        if tensor.dim() == 1:
            assert torch.equal(found[name], tensor)
        else:
            expected = Int8.allocate(*tensor.shape, torch.float32, lambda shape, dtype: torch.empty(shape, dtype=dtype))
            expected.copy_(tensor)
            assert torch.equal(found[name].codes, expected.codes)
    ours, theirs = (
        Model.from_pretrained(tmp_path / name, device="cpu", cache_tokens=512) for name in ("out", "toy.gguf")
    )
    assert ours.dtype == (theirs.dtype if kind == Q.Q6_K else torch.float32)
    chat = [{"role": "user", "content": "abc <|im_end|>"}]
    for tokenizer in (ours.tokenizer, theirs.tokenizer):
        assert tokenizer.encode_chat(chat) == theirs.tokenizer.encode_chat(chat)
        assert tokenizer.end_of_text_ids == theirs.tokenizer.end_of_text_ids
        assert tokenizer.vocab_size == theirs.tokenizer.vocab_size == CONFIG.vocab_size
    assert ours.chat(chat, max_tokens=4).num_tokens == 4


def test_sampling_and_ends_of_a_gguf_file_are_kept():
    generation = Generation(frozenset({3, 1}), {"temperature": 0.5, "top_k": 20})
    files = small_files(SimpleNamespace(generation=generation), SimpleNamespace(files=dict))
    found = Generation.from_fields(json.loads(files["generation_config.json"]), 8, "x")
    assert (found.end_ids, found.sampling) == (generation.end_ids, generation.sampling)


def test_the_numbers_of_a_gguf_file_are_kept():
    scaled = replace(CONFIG, rope_theta=2e6, rope_scaling=YarnScaling(4.0, 512), rms_norm_eps=1e-5)
    assert Config.from_dict(json.loads(json.dumps(config_fields(scaled)))) == scaled


def test_what_is_there_is_not_overwritten(dense, tmp_path):
    for taken in ("file", "folder", "link"):
        out = tmp_path / taken
        {"file": out.touch, "folder": out.mkdir, "link": lambda: out.symlink_to("nowhere")}[taken]()  # noqa: B023
        with pytest.raises(RequestError, match=rf"{taken}: exists; expected the name of a new folder"):
            quantise(str(dense), out, "int8")


def test_what_is_quantised_already_is_refused(dense, tmp_path):
    quantise(str(dense), tmp_path / "out", "int8")
    with pytest.raises(
        RequestError, match=r"quantize is 'int4', and the weights of .*out are quantised already \(int8\)"
    ):
        quantise(str(tmp_path / "out"), tmp_path / "again", "int4")
    assert not (tmp_path / "again").exists()
    with pytest.raises(RequestError, match="--to is 'q4_0'; expected one of 'int8'"):
        quantise(str(dense), tmp_path / "again", "q4_0")


def test_the_command(dense, tmp_path):
    done = CliRunner().invoke(app, ["quantize", str(dense), str(tmp_path / "out"), "--to", "int8"])
    assert done.exit_code == 0, done.output
    assert done.stdout.strip().endswith("out")
    assert (tmp_path / "out" / "config.json").is_file()
    assert (tmp_path / "out" / "tokenizer.json").is_file()
