"""Folders of checkpoints, and the copy of each tensor into the packed parameters."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import TINY as TINY_MODEL
from support.models import save_checkpoint, tiny_model
from torch import nn
from transformers import Qwen2ForCausalLM

from qwenkern import Model
from qwenkern.checkpoint import load_weights, open_checkpoint
from qwenkern.config import Config
from qwenkern.errors import CheckpointError, ConfigError
from qwenkern.kernels.weights import Dense

TINY = Config(
    vocab_size=24,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,  # so that no two sizes are equal
    source="tiny",
)
TIED = replace(TINY, tie_word_embeddings=True)
INDEX = "model.safetensors.index.json"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def random_weights(config: Config = TINY, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Under Hugging Face's names; written out by hand, as the model of transformers has them."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (24, 8), "model.norm.weight": (8,)}
    for i in range(config.num_hidden_layers):
        shapes |= {
            f"model.layers.{i}.input_layernorm.weight": (8,),
            f"model.layers.{i}.self_attn.q_proj.weight": (24, 8),
            f"model.layers.{i}.self_attn.q_proj.bias": (24,),
            f"model.layers.{i}.self_attn.k_proj.weight": (12, 8),
            f"model.layers.{i}.self_attn.k_proj.bias": (12,),
            f"model.layers.{i}.self_attn.v_proj.weight": (12, 8),
            f"model.layers.{i}.self_attn.v_proj.bias": (12,),
            f"model.layers.{i}.self_attn.o_proj.weight": (8, 24),
            f"model.layers.{i}.post_attention_layernorm.weight": (8,),
            f"model.layers.{i}.mlp.gate_proj.weight": (12, 8),
            f"model.layers.{i}.mlp.up_proj.weight": (12, 8),
            f"model.layers.{i}.mlp.down_proj.weight": (8, 12),
        }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (24, 8)
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


class Weights(nn.Module):
    """Parameters full of NaN."""

    is_allocated = True

    def __init__(self, dtype: torch.dtype, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.full(shape, torch.nan, dtype=dtype)))

    @property
    def value(self) -> Dense:
        return Dense(self.weight.data)


def fake_module(config: Config = TINY, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The parameters of the model under their packed names, without the model."""

    def layer() -> nn.Module:
        return nn.ModuleDict(
            {
                "input_layernorm": Weights(dtype, weight=(8,)),
                "self_attn": nn.ModuleDict(
                    {
                        "qkv_proj": Weights(dtype, weight=(48, 8), bias=(48,)),
                        "o_proj": Weights(dtype, weight=(8, 24)),
                    }
                ),
                "post_attention_layernorm": Weights(dtype, weight=(8,)),
                "mlp": nn.ModuleDict(
                    {"gate_up_proj": Weights(dtype, weight=(24, 8)), "down_proj": Weights(dtype, weight=(8, 12))}
                ),
            }
        )

    embedding = Weights(dtype, weight=(24, 8))
    model = nn.ModuleDict(
        {
            "embed_tokens": embedding,
            "layers": nn.ModuleList(layer() for _ in range(config.num_hidden_layers)),
            "norm": Weights(dtype, weight=(8,)),
        }
    )
    head = Weights(dtype, weight=(24, 8))
    if config.tie_word_embeddings:
        head.weight = embedding.weight
    return nn.ModuleDict({"model": model, "lm_head": head})


def expected_state(weights: dict[str, torch.Tensor], config: Config = TINY) -> dict[str, torch.Tensor]:
    """What the packed parameters must hold, concatenated by hand."""
    state = {"lm_head.weight": weights.get("lm_head.weight", weights["model.embed_tokens.weight"])}
    state |= {name: weights[name] for name in ("model.embed_tokens.weight", "model.norm.weight")}
    for i in range(config.num_hidden_layers):
        p = f"model.layers.{i}."
        for name in ("input_layernorm", "self_attn.o_proj", "post_attention_layernorm", "mlp.down_proj"):
            state[f"{p}{name}.weight"] = weights[f"{p}{name}.weight"]
        for kind in ("weight", "bias"):
            parts = [weights[f"{p}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            state[f"{p}self_attn.qkv_proj.{kind}"] = torch.cat(parts)
        gate_up = [weights[f"{p}mlp.{part}_proj.weight"] for part in ("gate", "up")]
        state[f"{p}mlp.gate_up_proj.weight"] = torch.cat(gate_up)
    return state


def assert_holds(module: nn.Module, state: dict[str, torch.Tensor]) -> None:
    found = module.state_dict()
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(found[name], tensor.to(found[name].dtype)), name


def load(weights, config: Config = TINY, module: nn.Module | None = None) -> nn.Module:
    module = module or fake_module(config)
    load_weights(module, config, weights.items() if isinstance(weights, dict) else weights, "here")
    return module


# --- load_weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [TINY, TIED], ids=["untied", "tied"])
def test_every_element_lands_in_its_packed_place(config):
    weights = random_weights(config)
    assert_holds(load(weights, config), expected_state(weights, config))


def test_the_order_of_the_tensors_does_not_matter():
    weights = random_weights()
    assert_holds(load(list(reversed(weights.items()))), expected_state(weights))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dtypes_are_converted_on_the_way(stored, wanted):
    weights = random_weights(dtype=stored)
    assert_holds(load(weights, module=fake_module(dtype=wanted)), expected_state(weights))


def test_the_module_keeps_its_parameters_and_they_may_require_gradients():
    module = fake_module(TIED)
    before = dict(module.named_parameters())
    load(random_weights(TIED), TIED, module)
    assert all(parameter is before[name] for name, parameter in module.named_parameters())
    assert module["lm_head"].weight is module["model"]["embed_tokens"].weight


def test_rotary_frequencies_are_skipped():
    weights = random_weights()
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3, dtype=torch.float64)}
    assert_holds(load(weights | extra), expected_state(weights))


@pytest.mark.parametrize("head_first", [True, False])
def test_a_superfluous_lm_head_is_accepted_when_it_repeats_the_embedding(head_first):
    weights = random_weights(TIED)
    head = {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    weights["model.embed_tokens.weight"][0, 0] = head["lm_head.weight"][0, 0] = torch.nan  # bits, not values
    module = load(head | weights if head_first else weights | head, TIED)
    assert module["lm_head"].weight.isnan().sum() == 1


@pytest.mark.parametrize("head_first", [True, False])
def test_an_lm_head_alone_is_the_embedding_too(head_first):
    weights = random_weights(TIED)
    head = {"lm_head.weight": weights.pop("model.embed_tokens.weight")}
    module = load(head | weights if head_first else weights | head, TIED)
    assert_holds(module, expected_state(random_weights(TIED), TIED))


TIES = {
    "embedding alone": lambda embedding: {"model.embed_tokens.weight": embedding},
    "head alone": lambda embedding: {"lm_head.weight": embedding},
    "equal": lambda embedding: {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding.clone()},
    "coarser head": lambda embedding: {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding.bfloat16()},
    "coarser embedding": lambda embedding: {
        "model.embed_tokens.weight": embedding.bfloat16(),
        "lm_head.weight": embedding,
    },
    "another last row": lambda embedding: {
        "model.embed_tokens.weight": embedding,
        "lm_head.weight": torch.cat((embedding[:-1], embedding[:1])),
    },
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", TIES)
def test_embeddings_are_tied_where_transformers_ties_them(form, dtype, tmp_path, caplog):
    save_checkpoint(tiny_model(replace(TINY_MODEL, tie_word_embeddings=True, num_hidden_layers=1)), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights |= TIES[form](weights.pop("model.embed_tokens.weight"))
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs = Qwen2ForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    model = Model.from_pretrained(tmp_path, device="cpu", dtype=dtype)
    ours = model.module
    tied = theirs.lm_head.weight is theirs.model.embed_tokens.weight
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied == model.config.tie_word_embeddings
    assert torch.equal(ours.lm_head.weight, theirs.lm_head.weight)
    assert torch.equal(ours.model.embed_tokens.weight, theirs.model.embed_tokens.weight)
    warned = "lm_head.weight differs from model.embed_tokens.weight, although the configuration says" in caplog.text
    assert warned == (not tied)
    shared = Model.from_transformers(theirs)
    assert shared.config.tie_word_embeddings == tied
    assert torch.equal(shared.forward([1, 2, 3]), model.forward([1, 2, 3]))


K_PROJ = "model.layers.1.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"model.layers.0.mlp.gate_up_proj.weight": torch.ones(24, 8)},
            r"unknown tensor model\.layers\.0\.mlp\.gate_up",
        ),
        ({"model.layers.3.mlp.up_proj.weight": torch.ones(12, 8)}, r"unknown tensor model\.layers\.3\.mlp\.up_proj"),
        ({K_PROJ: torch.ones(24, 8)}, r"k_proj\.weight has shape \(24, 8\); expected \(12, 8\)"),
        ({K_PROJ: torch.ones(8, 12)}, r"k_proj\.weight has shape \(8, 12\); expected \(12, 8\)"),
        ({K_PROJ: torch.ones(96)}, r"k_proj\.weight has shape \(96,\); expected \(12, 8\)"),
        ({K_PROJ: torch.ones(12, 8).int()}, r"k_proj\.weight has dtype torch\.int32; expected one of torch\.bfloat16"),
        ({K_PROJ: torch.ones(12, 8).to(torch.float8_e4m3fn)}, r"k_proj\.weight has dtype torch\.float8_e4m3fn"),
        ({K_PROJ: torch.ones(12, 8).double()}, r"k_proj\.weight has dtype torch\.float64"),
        ({K_PROJ: torch.ones(12, 8).bool()}, r"k_proj\.weight has dtype torch\.bool"),
    ],
)
def test_wrong_tensors_are_refused(changed, message):
    with pytest.raises(CheckpointError, match=rf"here: (tensor .*)?{message}"):
        load(random_weights() | changed)


def test_a_tensor_given_twice_is_refused():
    weights = list(random_weights().items())
    with pytest.raises(CheckpointError, match=r"here: tensor model\.norm\.weight is given twice"):
        load([*weights, weights[1]])


@pytest.mark.parametrize(
    ("dropped", "message"),
    [
        ("model.norm.", r"1 of 39 tensors are missing: model\.norm\.weight$"),
        ("lm_head.", r"1 of 39 tensors are missing: lm_head\.weight$"),
        ("model.layers.1.", r"12 of 39 tensors are missing: layer 1$"),
        (("model.layers.1.", "model.layers.2."), r"24 of 39 tensors are missing: layers 1\.\.2$"),
        (("model.layers.0.", "model.layers.2.", "model.norm"), r"25 of 39 .*: layer 0, layer 2, model\.norm\.weight$"),
        ("model.layers.0.self", r"7 of 39 .*: model\.layers\.0\.self_attn\.q_proj\.weight, .*, \.\.\.$"),
        ("", r"39 of 39 tensors are missing: layers 0\.\.2, model\.embed_tokens\.weight"),
    ],
)
def test_missing_tensors_are_counted_and_named(dropped, message):
    weights = {name: tensor for name, tensor in random_weights().items() if not name.startswith(dropped)}
    with pytest.raises(CheckpointError, match=rf"here: {message}"):
        load(weights)


# --- folders ----------------------------------------------------------------------------------------------------------


def write_config(folder: Path, config: Config = TINY, **changes) -> None:
    fields = {
        "model_type": "qwen2",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "tie_word_embeddings": config.tie_word_embeddings,
        "rope_theta": 1e6,
    }
    (folder / "config.json").write_text(json.dumps(fields | changes))


def write_single(folder: Path, weights=None, name: str = "model.safetensors", config: Config = TINY) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, config)
    save_file(random_weights(config) if weights is None else weights, folder / name, metadata={"format": "pt"})
    return folder / name


def write_sharded(folder: Path, weights=None) -> dict[str, str]:
    """Two shards and their index; returns the index's weight_map."""
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder)
    weights = random_weights() if weights is None else weights
    names = list(weights)
    weight_map = {}
    for file, part in zip(SHARDS, (names[:17], names[17:]), strict=True):
        save_file({name: weights[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    checkpoint = open_checkpoint(folder)
    module = fake_module(checkpoint.config, dtype)
    load_weights(module, checkpoint.config, checkpoint.tensors(dtype), str(folder))
    return module


@pytest.mark.parametrize("name", ["model.safetensors", "other.safetensors"])
def test_a_folder_with_one_file(name, tmp_path):
    write_single(tmp_path, name=name)
    assert_holds(loaded(tmp_path), expected_state(random_weights()))
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.path == tmp_path
    assert replace(checkpoint.config, source="tiny") == replace(TINY, dtype="float32")  # as the file has them
    assert (checkpoint.generation.end_ids, checkpoint.metadata) == (frozenset(), {})
    tensors = dict(checkpoint.tensors(torch.bfloat16))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == checkpoint.shapes
    assert checkpoint.num_bytes(torch.bfloat16) == sum(tensor.nbytes for tensor in tensors.values())


def test_a_folder_with_shards(tmp_path):
    write_sharded(tmp_path)
    assert_holds(loaded(tmp_path, torch.bfloat16), expected_state(random_weights()))


def test_model_safetensors_is_taken_from_among_others(tmp_path):
    write_single(tmp_path)
    write_single(tmp_path, {"x": torch.ones(1)}, name="adapter.safetensors")
    assert_holds(loaded(tmp_path), expected_state(random_weights()))


@pytest.mark.parametrize("sharded", [False, True])
def test_the_layout_of_the_hub_cache(sharded, tmp_path):
    """snapshots/<revision>/<file> -> ../../blobs/<hash>; everything is a link, config.json too."""
    snapshot, blobs = tmp_path / "models--Q--q" / "snapshots" / "abc123", tmp_path / "models--Q--q" / "blobs"
    (write_sharded if sharded else write_single)(snapshot)
    blobs.mkdir()
    for n, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(blobs / f"hash{n}")
        file.symlink_to(Path("..", "..", "blobs", f"hash{n}"))
    assert_holds(loaded(snapshot), expected_state(random_weights()))
    (tmp_path / "nickname").symlink_to(snapshot)
    assert_holds(loaded(tmp_path / "nickname"), expected_state(random_weights()))


@pytest.mark.parametrize(
    "said", [{}, {"dtype": None, "torch_dtype": None}, {"torch_dtype": "float16"}, {"dtype": "float32"}]
)
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16, "mixed"], ids=str)
@pytest.mark.parametrize("shards", [1, 2])
def test_the_dtype_is_the_one_that_transformers_takes(shards, stored, said, tmp_path):
    weights = random_weights(dtype=torch.bfloat16 if stored == "mixed" else stored)
    if stored == "mixed":
        weights |= {name: tensor.float() for name, tensor in weights.items() if "norm" in name or "layers.0" in name}
        weights["lm_head.weight"] = weights["lm_head.weight"].half()
    (write_single if shards == 1 else write_sharded)(tmp_path, weights)
    write_config(tmp_path, **said)
    theirs = Qwen2ForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert open_checkpoint(tmp_path).config.dtype == str(theirs.dtype).removeprefix("torch.")


def test_of_two_spellings_of_the_dtype_the_newer_counts(tmp_path):
    write_single(tmp_path)
    write_config(tmp_path, torch_dtype="float16", dtype="bfloat16")
    assert Qwen2ForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16
    assert open_checkpoint(tmp_path).config.dtype == "bfloat16"


def test_generation_config_is_passed_on(tmp_path):
    write_single(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 3], "top_p": 0.8}')
    generation = open_checkpoint(tmp_path).generation
    assert (generation.end_ids, generation.sampling) == ({3, 5}, {"temperature": 0.0, "top_p": 0.8})


def test_tensors_of_the_wanted_dtype_are_views_of_the_mapped_file(tmp_path):
    save = random_weights(TIED) | {"model.embed_tokens.weight": torch.zeros(24, 8)}
    file = write_single(tmp_path, save, config=TIED)
    tensors = dict(open_checkpoint(tmp_path).tensors(torch.float32))
    raw = file.read_bytes()
    with open(file, "r+b") as stream:  # a byte changed after the tensor was made shows in it
        at = raw.index(struct.pack("<f", float(save["model.norm.weight"][0])))
        stream.seek(at)
        stream.write(struct.pack("<f", 42.0))
    assert tensors["model.norm.weight"][0] == 42


# --- folders that are wrong -------------------------------------------------------------------------------------------


def refused(path: Path, message: str, error: type[Exception] = CheckpointError) -> None:
    with pytest.raises(error, match=message):
        open_checkpoint(path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.pkl", "model.ckpt"])
def test_pickles_are_never_opened(name, tmp_path):
    file = tmp_path / name
    file.write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    refused(file, rf"{name}: is a pickle file, which qwenkern never opens; expected safetensors: convert it")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_a_folder_of_pickles_is_refused(name, tmp_path):
    write_config(tmp_path)
    (tmp_path / name).write_bytes(b"x")
    refused(tmp_path, rf"only pickle files \({name}\), which qwenkern never opens; convert them to safetensors")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", r"absent: no such file or folder"),
        ("model.safetensors", r"is one file of weights; expected the folder that has it and its config\.json"),
        ("notes.txt", r"notes\.txt: expected a folder with config\.json and \*\.safetensors, or a GGUF file"),
    ],
)
def test_other_paths_are_refused(name, message, tmp_path):
    if name != "absent":
        (tmp_path / name).write_bytes(b"x")
    refused(tmp_path / name, message)


def test_paths_that_the_system_refuses(tmp_path, monkeypatch):
    refused(Path("x" * 5000), r"^x{500}: cannot be read: File name too long$")
    write_single(tmp_path)

    def not_for_you(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_file", not_for_you)  # as in a folder of another user
    refused(tmp_path, r"cannot be read: Permission denied")


def test_folders_without_what_is_needed(tmp_path):
    refused(tmp_path, r"has no \.safetensors files$")
    (tmp_path / "q.gguf").write_bytes(b"x")
    refused(tmp_path, r"no \.safetensors files; expected them, or the path of a GGUF file: .*q\.gguf")
    write_single(tmp_path)
    (tmp_path / "config.json").unlink()
    refused(tmp_path, r"has weights but no config\.json")
    write_config(tmp_path, hidden_size=None)
    refused(tmp_path, r"hidden_size is missing", ConfigError)


@pytest.mark.parametrize("weights", ["whole", "damaged", "none"])
def test_quantised_weights_are_refused_from_the_configuration(weights, tmp_path):
    write_single(tmp_path)
    if weights != "whole":
        (tmp_path / "model.safetensors").write_bytes(b"x")
    if weights == "none":
        (tmp_path / "model.safetensors").unlink()
    write_config(tmp_path, quantization_config={"quant_method": "aqlm", "bits": 4})
    refused(tmp_path, r"config\.json: quantization_config says that the weights are quantised by 'aqlm'")


def test_several_files_without_an_index_are_refused(tmp_path):
    write_sharded(tmp_path)
    (tmp_path / INDEX).unlink()
    refused(tmp_path, rf"has 2 \.safetensors files and no {INDEX}")


def test_a_single_file_beside_an_index_of_others_is_refused(tmp_path):
    write_sharded(tmp_path)
    write_single(tmp_path)
    refused(
        tmp_path, rf"has model\.safetensors and an {INDEX} without it; expected one of the two: remove the stale one"
    )


def test_a_configuration_that_does_not_fit_the_tensors_is_refused_before_anything_is_allocated(tmp_path):
    write_single(tmp_path)
    write_config(tmp_path, vocab_size=25)
    refused(tmp_path, r"(embed_tokens|lm_head)\.weight has shape \(24, 8\); expected \(25, 8\)")
    write_config(tmp_path, num_hidden_layers=4)
    refused(tmp_path, r"12 of 51 tensors are missing: layer 3$")
    write_config(tmp_path, num_hidden_layers=2)
    refused(tmp_path, r"unknown tensor model\.layers\.2\.")
    write_config(tmp_path, num_hidden_layers=1024)
    refused(tmp_path, r"has 39 tensors; expected those of a model of 1024 layers")
    write_config(tmp_path, num_hidden_layers=16_000_000)
    refused(tmp_path, r"num_hidden_layers is 16000000; expected a whole number from 1 to 1024", ConfigError)


def test_integers_in_a_file_are_refused_when_loaded(tmp_path):
    write_single(tmp_path, random_weights() | {"model.norm.weight": torch.ones(8, dtype=torch.int8)})
    with pytest.raises(CheckpointError, match=r"tensor model\.norm\.weight has dtype torch\.int8"):
        loaded(tmp_path)


# headers, written by hand: u64 length | JSON | data


def raw_file(header: bytes | dict, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


TWICE = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
BAD = {
    "empty": b"",
    "garbage": b"this is no safetensors file at all",
    "length beyond the file": raw_file({}, length=1000),
    "length beyond any file": raw_file({}, length=2**63),
    "a header of 16 MB": raw_file(json.dumps({"a": entry(0, 16)}).encode() + b" " * (1 << 24), bytes(16)),
    "not JSON": raw_file(b"{]"),
    "not an object": raw_file(b"[1, 2]"),
    "deep": raw_file(b"[" * 100_000),
    "not UTF-8": raw_file(b'{"\xff": 1}'),
    "truncated data": raw_file({"a": entry(0, 16)}, bytes(12)),
    "left-over data": raw_file({"a": entry(0, 16)}, bytes(20)),
    "overlap": raw_file({"a": entry(0, 16), "b": entry(8, 24)}, bytes(24)),
    "gap": raw_file({"a": entry(0, 8), "b": entry(12, 24)}, bytes(24)),
    "shape and bytes differ": raw_file({"a": entry(0, 16, [5])}, bytes(16)),
    "negative": raw_file({"a": entry(0, 16, [-4])}, bytes(16)),
    "unknown dtype": raw_file({"a": entry(0, 16, dtype="Q9")}, bytes(16)),
}


@pytest.mark.parametrize("name", BAD)
def test_a_damaged_file_is_refused(name, tmp_path):
    write_single(tmp_path).write_bytes(BAD[name])
    refused(tmp_path, r"model\.safetensors: cannot be read: .+")


def test_a_name_twice_in_the_header_is_refused(tmp_path):
    write_single(tmp_path).write_bytes(raw_file(TWICE, bytes(4)))
    refused(tmp_path, r"model\.safetensors: cannot be read: 'a' occurs twice")


def test_a_file_that_shrinks_by_one_byte_is_refused(tmp_path):
    file = write_single(tmp_path)
    file.write_bytes(file.read_bytes()[:-1])
    refused(tmp_path, r"model\.safetensors: cannot be read: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"not readable as JSON: "),
        ("{", r"not readable as JSON: "),
        ("[]", r"holds a list; expected a JSON object"),
        ("[" * 100_000, r"not readable as JSON: "),
        ("1" * 5000, r"not readable as JSON: "),
        ("{}", r"expected an object weight_map from tensors to files, found None"),
        ('{"weight_map": {}}', r"expected an object weight_map from tensors to files, found \{\}"),
        ('{"weight_map": ["a"]}', r"expected an object weight_map"),
        ('{"weight_map": {"a": "x.safetensors", "a": "x.safetensors"}}', r"not readable as JSON: 'a' occurs twice"),
        ('{"weight_map": {"a": 3}}', r"tensor a is in 3; expected the bare name of a \.safetensors file"),
    ],
)
def test_a_damaged_index_is_refused(text, message, tmp_path):
    write_sharded(tmp_path)
    (tmp_path / INDEX).write_text(text)
    refused(tmp_path, rf"{INDEX}: {message}")


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/tmp/outside.safetensors",
        "sub/inside.safetensors",
        "sub\\inside.safetensors",
        "C:outside.safetensors",
        "pytorch_model.bin",
        "..",
        "",
        "model.safetensors\0.safetensors",
    ],
)
def test_an_index_that_leads_elsewhere_is_refused(name, tmp_path):
    folder = tmp_path / "model"
    weight_map = write_sharded(folder)
    write_single(tmp_path, name="outside.safetensors")
    write_single(folder / "sub", name="inside.safetensors")
    write_index(folder, weight_map | {"model.norm.weight": name})
    refused(folder, r"tensor model\.norm\.weight is in .*; expected the bare name of a \.safetensors file")


@pytest.mark.parametrize("sharded", [False, True])
def test_a_link_out_of_the_folder_is_followed_only_on_request(sharded, tmp_path, monkeypatch):
    folder, outside = tmp_path / "model", tmp_path / "secret"
    name = SHARDS[0] if sharded else "model.safetensors"
    (write_sharded if sharded else write_single)(folder)
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    refused(folder, rf"{name}: is a link to .*secret, outside of .*model.*QWENKERN_FOLLOW_LINKS=1 if you made")
    monkeypatch.setenv("QWENKERN_FOLLOW_LINKS", "1")
    assert_holds(loaded(folder), expected_state(random_weights()))


def test_blobs_beside_a_folder_that_is_no_snapshot_are_outside(tmp_path):
    folder, blobs = tmp_path / "copies" / "abc", tmp_path / "blobs"
    write_single(folder)
    blobs.mkdir()
    (folder / "model.safetensors").rename(blobs / "hash")
    (folder / "model.safetensors").symlink_to(blobs / "hash")
    refused(folder, r"model\.safetensors: is a link to .*hash, outside of")


def test_missing_shards_are_named(tmp_path):
    write_sharded(tmp_path)
    (tmp_path / SHARDS[1]).unlink()
    refused(tmp_path, rf"{SHARDS[1]}: is missing; {INDEX} names it")
    (tmp_path / SHARDS[1]).symlink_to(SHARDS[1])  # a loop
    refused(tmp_path, rf"{SHARDS[1]}: is missing; {INDEX} names it")


def test_a_folder_in_place_of_a_shard_is_refused(tmp_path):
    write_sharded(tmp_path)
    (tmp_path / SHARDS[1]).unlink()
    (tmp_path / SHARDS[1]).mkdir()
    refused(tmp_path, rf"{SHARDS[1]}: leads to .*; expected a file")


def test_index_and_files_must_agree(tmp_path):
    weight_map = write_sharded(tmp_path)
    write_index(tmp_path, weight_map | {"extra": SHARDS[0]})
    refused(tmp_path, rf"{SHARDS[0]}: tensor extra is in the index only")
    write_index(tmp_path, {name: file for name, file in weight_map.items() if name != "model.norm.weight"})
    refused(tmp_path, rf"{SHARDS[0]}: tensor model\.norm\.weight is in the file only")
    write_index(tmp_path, weight_map | {"model.norm.weight": SHARDS[1]})
    refused(tmp_path, r"tensor model\.norm\.weight is in the (file|index) only")


@pytest.mark.parametrize(("text", "message"), [("[1]", "holds a list"), ("{", "not readable")])
def test_a_damaged_generation_config_is_refused(text, message, tmp_path):
    write_single(tmp_path)
    (tmp_path / "generation_config.json").write_text(text)
    refused(tmp_path, rf"generation_config\.json: .*{message}")
