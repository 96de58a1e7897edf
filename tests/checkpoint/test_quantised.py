"""Quantised safetensors checkpoints: every value as the formats' specifications define it, and refusals."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import packers
from support.packers import (
    CONFIG,
    LAYER,
    MATRICES,
    Integers,
    awq,
    gptq,
    int_quantized,
    integers,
    pack_quantized,
    packed,
    scheme,
    write_checkpoint,
)
from support.tolerances import MEAN_KL_FLOAT32, divergences
from torch import Tensor

from qwenkern import Model
from qwenkern.checkpoint import Checkpoint, open_checkpoint
from qwenkern.errors import CheckpointError
from qwenkern.kernels import Weight
from qwenkern.kernels.c import build

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "GEMM", "zero_point": True}
Q = f"{LAYER}self_attn.q_proj"
DOWN = f"{LAYER}mlp.down_proj"


def write(
    folder: Path,
    quantization: dict[str, Any],
    pack: Callable[[Integers], dict[str, Tensor]],
    made: Callable[[tuple[int, int]], Integers],
    change: Callable[[dict[str, Tensor]], None] = lambda tensors: None,
    **fields: Any,
) -> tuple[dict[str, Tensor], dict[str, Integers]]:
    """Writes a checkpoint. Returns its dense tensors, and its matrices by the names of dense ones."""
    matrices = {f"{LAYER}{name}.weight": made(shape) for name, shape in packers.MATRICES.items()}
    dense = write_checkpoint(
        folder, quantization, lambda name, shape: pack(matrices[f"{LAYER}{name}.weight"]), change, **fields
    )
    return dense, matrices


def loaded(folder: Path, dtype: torch.dtype = torch.float64) -> tuple[Checkpoint, dict[str, Tensor | Weight]]:
    """An opened checkpoint and all that it yields, each once."""
    checkpoint = open_checkpoint(folder)
    values = list(checkpoint.tensors(dtype))
    found = dict(values)
    assert len(values) == len(found)
    assert found.keys() == checkpoint.shapes.keys()
    assert checkpoint.num_bytes(dtype) == sum(value.nbytes for value in found.values())
    for name, value in found.items():
        assert tuple(value.shape) == checkpoint.shapes[name]
        assert value.dtype == dtype
        assert isinstance(value, Weight) == (name in checkpoint.formats)
        if isinstance(value, Weight):
            plan = checkpoint.formats[name]
            assert plan.device.type == "meta"
            assert plan.format == value.format
            for mine, other in zip(plan.tensors[:-1], value.tensors[:-1], strict=True):
                assert (mine.shape, mine.dtype) == (other.shape, other.dtype)
    return checkpoint, found


def assert_the_same_dense(checkpoint: Checkpoint, found: dict[str, Tensor | Weight], dtype: torch.dtype) -> None:
    """That a checkpoint that is asked for dense matrices yields what its quantised ones stand for."""
    dense = dict(checkpoint.tensors(dtype, dense=True))
    assert list(dense) == list(found)
    assert checkpoint.num_bytes(dtype, dense=True) == sum(value.nbytes for value in dense.values())
    for name, value in found.items():
        assert torch.equal(dense[name], value.dequantise() if isinstance(value, Weight) else value), name


def assert_holds(
    folder: Path, dense: dict[str, Tensor], matrices: dict[str, Integers], form: str | None
) -> dict[str, Tensor | Weight]:
    """The values of a checkpoint, exactly, in float64; all matrices in this format, or dense ones."""
    checkpoint, found = loaded(folder)
    assert found.keys() == dense.keys() | matrices.keys()
    for name, tensor in dense.items():
        assert torch.equal(found[name], tensor.double())
    for name, matrix in matrices.items():
        value = found[name]
        assert (value.format if isinstance(value, Weight) else None) == form
        assert torch.equal(value.dequantise() if isinstance(value, Weight) else value, matrix.matrix()), name
    assert_the_same_dense(checkpoint, found, torch.float64)
    return found


# --- GPTQ -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 64, 128, -1])
@pytest.mark.parametrize("bits", [4, 8])
def test_gptq(bits, group, symmetric, storage, tmp_path):
    def made(shape: tuple[int, int]) -> Integers:
        matrix = integers(shape, bits, group, symmetric)
        matrix.zeros.clip(min=storage == "gptq", out=matrix.zeros)  # v1 has no zero point of 0
        return matrix

    config = GPTQ | {"bits": bits, "group_size": group, "sym": symmetric, "checkpoint_format": storage}
    dense, matrices = write(tmp_path, config, lambda matrix: gptq(matrix, bits, storage), made)
    assert_holds(tmp_path, dense, matrices, f"int{bits}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_scales_are_converted_exactly(dtype, tmp_path):
    made = lambda shape: integers(shape, 8, 32, symmetric=True, dtype=dtype)  # noqa: E731
    dense, matrices = write(tmp_path, GPTQ | {"bits": 8, "sym": True}, lambda matrix: gptq(matrix, 8), made)
    found = assert_holds(tmp_path, dense, matrices, "int8")
    assert found[f"{Q}.weight"].scales.dtype == (torch.int16 if dtype == torch.float16 else torch.int32)


def test_the_largest_zero_point_of_v1_does_not_wrap(tmp_path):
    """AutoGPTQ's and vLLM's kernels add one to what is stored: 15 is 16. In 8 bits 256 has no place in our format."""

    def made(shape: tuple[int, int]) -> Integers:
        matrix = integers(shape, 4, 32)
        matrix.zeros[:, 0], matrix.zeros[:, 1:] = 16, matrix.zeros[:, 1:].clip(1)
        return matrix

    dense, matrices = write(tmp_path, GPTQ, lambda matrix: gptq(matrix, 4), made)
    assert_holds(tmp_path, dense, matrices, "int4")


def test_a_zero_point_of_256_is_refused(tmp_path):
    def made(shape: tuple[int, int]) -> Integers:
        matrix = integers(shape, 8, 32)
        matrix.zeros[:] = 256
        return matrix

    write(tmp_path, GPTQ | {"bits": 8}, lambda matrix: gptq(matrix, 8), made)
    with pytest.raises(CheckpointError, match=r"tensor .*qzeros has the zero point 256; expected 0 to 255"):
        loaded(tmp_path)


@pytest.mark.parametrize("bits", [4, 8])
def test_zero_points_that_gptqmodel_reduced_in_whole_words(bits, tmp_path):
    """It subtracts 0x11111111 from each word, so a zero point of 0 borrows from its neighbour."""

    def pack(matrix: Integers) -> dict[str, Tensor]:
        words = packed(matrix.zeros.T, bits, 1).numpy().view(np.uint32)
        ones = np.uint32(0x11111111 if bits == 4 else 0x01010101)
        return gptq(matrix, bits) | {"qzeros": torch.from_numpy((words - ones).view(np.int32))}

    config = GPTQ | {"bits": bits, "meta": {"quantizer": ["gptqmodel:1.4.0"]}, "checkpoint_format": "gptq"}
    dense, matrices = write(tmp_path, config, pack, lambda shape: integers(shape, bits, 32))
    assert any((matrix.zeros == 0).any() for matrix in matrices.values())
    assert_holds(tmp_path, dense, matrices, f"int{bits}")


def test_columns_in_another_order_become_dense_with_a_warning(tmp_path, caplog):
    def made(shape: tuple[int, int]) -> Integers:
        matrix = integers(shape, 4, 32)
        matrix.zeros.clip(1, out=matrix.zeros)
        np.random.default_rng(1).shuffle(matrix.groups)
        return matrix

    dense, matrices = write(tmp_path, GPTQ | {"desc_act": True}, lambda matrix: gptq(matrix, 4), made)
    assert_holds(tmp_path, dense, matrices, None)
    [record] = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "7 of 7 quantised matrices (such as model.layers.0." in record.message
    assert "dequantised to torch.float64" in record.message
    assert "take 1 MB instead of about 0" in record.message
    caplog.clear()
    loaded(tmp_path, torch.bfloat16)
    assert "dequantised to torch.bfloat16" in caplog.text


def test_groups_that_are_all_zero_are_in_order(tmp_path):
    pack = lambda matrix: gptq(matrix, 4, "gptq_v2") | {"g_idx": torch.zeros(len(matrix.groups)).int()}  # noqa: E731
    config = GPTQ | {"checkpoint_format": "gptq_v2"}
    dense, matrices = write(tmp_path, config, pack, lambda shape: integers(shape, 4, 32))
    assert_holds(tmp_path, dense, matrices, "int4")


def test_a_file_without_groups_is_in_order(tmp_path):
    def pack(matrix: Integers) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in gptq(matrix, 4, "gptq_v2").items() if name != "g_idx"}

    config = GPTQ | {"checkpoint_format": "gptq_v2"}
    dense, matrices = write(tmp_path, config, pack, lambda shape: integers(shape, 4, 32))
    assert_holds(tmp_path, dense, matrices, "int4")


@pytest.mark.parametrize("group", [16, 8])
def test_groups_that_no_format_has_become_dense(group, tmp_path, caplog):
    config = GPTQ | {"checkpoint_format": "gptq_v2", "group_size": group}
    dense, matrices = write(
        tmp_path, config, lambda matrix: gptq(matrix, 4, "gptq_v2"), lambda shape: integers(shape, 4, group)
    )
    assert_holds(tmp_path, dense, matrices, None)
    assert "7 of 7 quantised matrices" in caplog.text


def test_biases_of_zeros_are_left_out(tmp_path):
    """AutoGPTQ writes one for every layer."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{DOWN}.bias"] = torch.zeros(128).half()

    config = GPTQ | {"checkpoint_format": "gptq_v2"}
    pack = lambda matrix: gptq(matrix, 4, "gptq_v2")  # noqa: E731
    dense, matrices = write(tmp_path, config, pack, lambda shape: integers(shape, 4, 32), change)
    assert_holds(tmp_path, dense, matrices, "int4")


def test_a_matrix_may_be_in_two_files(tmp_path):
    import json

    config = GPTQ | {"checkpoint_format": "gptq_v2"}
    dense, matrices = write(
        tmp_path, config, lambda matrix: gptq(matrix, 4, "gptq_v2"), lambda shape: integers(shape, 4, 32)
    )
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    weight_map = {}
    for i, chosen in enumerate((False, True)):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        part = {name: tensor for name, tensor in tensors.items() if name.endswith("scales") is chosen}
        save_file(part, tmp_path / file)
        weight_map |= dict.fromkeys(part, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_holds(tmp_path, dense, matrices, "int4")


# --- AWQ --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [32, 64, 128, -1])
def test_awq(group, tmp_path):
    dense, matrices = write(tmp_path, AWQ | {"group_size": group}, awq, lambda shape: integers(shape, 4, group))
    assert_holds(tmp_path, dense, matrices, "int4")


# --- compressed-tensors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("strategy", "group"), [("channel", -1), ("group", 64)])
@pytest.mark.parametrize(
    ("bits", "format"),
    [(8, "int-quantized"), (4, "int-quantized"), (8, "naive-quantized"), (4, "pack-quantized"), (8, "pack-quantized")],
)
def test_compressed_tensors(bits, format, strategy, group, symmetric, tmp_path):
    config = scheme(bits, strategy, format, symmetric=symmetric, group_size=None if group == -1 else group)
    pack = pack_quantized if format == "pack-quantized" else int_quantized
    dense, matrices = write(
        tmp_path,
        config,
        lambda matrix: pack(matrix, bits, symmetric),
        lambda shape: integers(shape, bits, group, symmetric, dtype=torch.bfloat16),
    )
    assert_holds(tmp_path, dense, matrices, f"int{bits}")


@pytest.mark.parametrize("shape_of_scale", [(), (1,), (1, 1)])
def test_one_scale_for_a_matrix(shape_of_scale, tmp_path):
    def made(shape: tuple[int, int]) -> Integers:
        matrix = integers(shape, 8, -1, symmetric=True, dtype=torch.float32)
        matrix.scales = matrix.scales[:1].expand(shape[0], 1)
        return matrix

    def pack(matrix: Integers) -> dict[str, Tensor]:
        tensors = int_quantized(matrix, 8, symmetric=True)
        return tensors | {"weight_scale": matrix.scales[0].clone().reshape(shape_of_scale)}

    dense, matrices = write(tmp_path, scheme(8, "tensor", "int-quantized"), pack, made)
    assert_holds(tmp_path, dense, matrices, "int8")


def test_compressed_tensors_in_another_order_become_dense(tmp_path):
    def made(shape: tuple[int, int]) -> Integers:
        matrix = integers(shape, 4, 32, symmetric=True)
        np.random.default_rng(1).shuffle(matrix.groups)
        return matrix

    def pack(matrix: Integers) -> dict[str, Tensor]:
        groups = torch.from_numpy(matrix.groups.astype(np.int32))
        return pack_quantized(matrix, 4, symmetric=True) | {"weight_g_idx": groups}

    config = scheme(4, "group", "pack-quantized", group_size=32, actorder="group")
    dense, matrices = write(tmp_path, config, pack, made)
    assert_holds(tmp_path, dense, matrices, None)


def test_zero_points_of_symmetric_codes_may_be_stored(tmp_path):
    def pack(matrix: Integers) -> dict[str, Tensor]:
        return int_quantized(matrix, 8, symmetric=True) | {
            "weight_zero_point": torch.zeros(len(matrix.codes), 1).to(torch.int8)
        }

    dense, matrices = write(
        tmp_path, scheme(8, "channel", "int-quantized"), pack, lambda shape: integers(shape, 8, -1, symmetric=True)
    )
    assert_holds(tmp_path, dense, matrices, "int8")


FP8 = scheme(8, "channel", "float-quantized", type="float")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_fp8(strategy, dtype, tmp_path, caplog):
    """Weights only: the scales of activations and of the cache are left out, and a line says so."""
    caplog.set_level(logging.INFO)
    random = torch.Generator().manual_seed(0)
    expected = {}

    def made(name: str, shape: tuple[int, int]) -> dict[str, Tensor]:
        codes = torch.randint(0, 256, shape, generator=random, dtype=torch.uint8)
        codes[codes & 127 == 127] = 0  # no NaN
        codes = codes.view(torch.float8_e4m3fn)
        scales = torch.rand((shape[0], 1) if strategy == "channel" else (1,), generator=random).to(dtype)
        expected[f"{LAYER}{name}.weight"] = codes.double() * scales.double()
        extra = {"self_attn.k_proj": {"k_scale": torch.ones(1)}}.get(name, {})
        return {"weight": codes, "weight_scale": scales, "input_scale": torch.ones(1)} | extra

    config = scheme(8, strategy, "float-quantized", type="float") | {"kv_cache_scheme": {"num_bits": 8}}
    config["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "dynamic": False}
    dense = write_checkpoint(tmp_path, config, made)
    checkpoint, found = loaded(tmp_path)
    assert found.keys() == dense.keys() | expected.keys()
    for name, matrix in expected.items():
        assert found[name].format == "fp8"
        assert torch.equal(found[name].dequantise(), matrix)
    assert caplog.text.count("quantises input activations; qwenkern does not") == 1
    assert caplog.text.count("quantises the key-value cache; its scales are not used") == 1
    assert_the_same_dense(checkpoint, found, torch.float64)


# --- sizes, and C or torch --------------------------------------------------------------------------------------------

STORED = {
    "gptq": (4, GPTQ | {"checkpoint_format": "gptq_v2", "group_size": -1}, lambda matrix: gptq(matrix, 4, "gptq_v2")),
    "gptq of 8 bits": (
        8,
        GPTQ | {"checkpoint_format": "gptq_v2", "group_size": -1, "bits": 8},
        lambda matrix: gptq(matrix, 8, "gptq_v2"),
    ),
    "awq": (4, AWQ | {"group_size": -1}, awq),
    "packed": (
        4,
        scheme(4, "channel", "pack-quantized", symmetric=False),
        lambda matrix: pack_quantized(matrix, 4, symmetric=False),
    ),
    "bytes": (
        8,
        scheme(8, "channel", "int-quantized", symmetric=False),
        lambda matrix: int_quantized(matrix, 8, symmetric=False),
    ),
    "bytes of 4 bits": (
        4,
        scheme(4, "channel", "int-quantized", symmetric=False),
        lambda matrix: int_quantized(matrix, 4, symmetric=False),
    ),
}


@pytest.mark.parametrize("where", ["C", "torch"])
@pytest.mark.parametrize("stored", STORED)
def test_sizes_that_our_formats_do_not_have(stored, where, tmp_path, monkeypatch, caplog):
    """Those matrices become dense, the others do not."""
    if where == "torch":
        monkeypatch.setattr(build, "prepare", lambda: "no C")
    odd = {"mlp.gate_proj": (248, 128), "mlp.up_proj": (248, 128), "mlp.down_proj": (128, 248)}
    monkeypatch.setattr(packers, "MATRICES", MATRICES | odd)
    bits, config, pack = STORED[stored]
    _, matrices = write(tmp_path, config, pack, lambda shape: integers(shape, bits, -1), intermediate_size=248)
    _, found = loaded(tmp_path)
    for name, matrix in matrices.items():
        value = found[name]
        assert isinstance(value, Weight) == (".mlp." not in name)
        assert torch.equal(value.dequantise() if isinstance(value, Weight) else value, matrix.matrix()), name
    assert "3 of 7 quantised matrices (such as model.layers.0.mlp.down_proj)" in caplog.text


# --- whole models -----------------------------------------------------------------------------------------------------


CASES = {
    "gptq": (GPTQ | {"checkpoint_format": "gptq_v2"}, lambda matrix: gptq(matrix, 4, "gptq_v2")),
    "awq": (AWQ, awq),
}


@pytest.mark.parametrize("method", CASES)
def test_a_model_is_that_of_its_dequantised_weights(method, tmp_path):
    config, pack = CASES[method]
    _, matrices = write(tmp_path / "quantised", config, pack, lambda shape: integers(shape, 4, 32))
    values = {name: matrix.matrix().float() for name, matrix in matrices.items()}
    write_checkpoint(tmp_path / "dense", None, lambda name, shape: {"weight": values[f"{LAYER}{name}.weight"]})
    prompt = [7, 3, 300, 41]
    model, truth = (
        Model.from_pretrained(tmp_path / name, device="cpu", dtype="float32") for name in ("quantised", "dense")
    )
    expected = truth.forward(prompt).double()
    assert divergences(expected, model.forward(prompt)).mean() <= MEAN_KL_FLOAT32


# --- what is refused --------------------------------------------------------------------------------------------------


def put(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: tensor})


def drop(name: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    return change


def at(name: str, place: Any, value: float) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name].clone()
        tensors[name][place] = value

    return change


SAYS = r"the configuration says gptq, int of 4 bits, groups of 32"
GPTQ_FAULTS = {
    "other bits": (
        {"bits": 8},
        None,
        r"qweight has shape \(32, 128\); expected \(64, 128\) for a matrix \[128, 256\], because .* int of 8 bits",
    ),
    "other groups": ({"group_size": 64}, None, r"qzeros has shape \(8, 16\); expected \(4, 16\) .* groups of 64"),
    "groups of 48": (
        {"group_size": 48},
        None,
        r"down_proj has 256 columns; .* groups of 48; expected groups that divide",
    ),
    "a dtype": ({}, put(f"{Q}.qweight", torch.zeros(16, 128)), rf"qweight has dtype F32; expected I32 .*{SAYS}"),
    "scales of integers": ({}, put(f"{Q}.scales", torch.zeros(4, 128).int()), "scales has dtype I32; expected F16 or"),
    "a shape": (
        {},
        put(f"{Q}.scales", torch.zeros(128, 4).half()),
        r"scales has shape \(128, 4\); expected \(4, 128\)",
    ),
    "no scales": ({}, drop(f"{Q}.scales"), rf"q_proj has g_idx, qweight, qzeros and no scales; .*{SAYS}"),
    "no zero points": ({}, drop(f"{Q}.qzeros"), "q_proj has g_idx, qweight, scales and no qzeros"),
    "no codes": ({}, drop(f"{Q}.qweight"), "q_proj has g_idx, qzeros, scales and no qweight"),
    "NaN": ({}, at(f"{Q}.scales", (1, 2), torch.nan), r"q_proj\.scales has 1 values that are NaN or infinite"),
    "infinity": ({}, at(f"{DOWN}.scales", 3, torch.inf), r"down_proj\.scales has 128 values that are NaN or infinite"),
    "a group too far": ({}, at(f"{Q}.g_idx", 5, 4), r"q_proj\.g_idx has groups 0 to 4; expected 0 to 3"),
    "a group below": ({}, at(f"{Q}.g_idx", 5, -1), r"q_proj\.g_idx has groups -1 to 3; expected 0 to 3"),
    "groups of fewer columns": (
        {},
        put(f"{Q}.g_idx", torch.zeros(5).int()),
        r"g_idx has shape \(5,\); expected \(128,",
    ),
    "symmetric": ({"sym": True}, None, r"qzeros has the zero point \d+, and the .* says symmetric; expected 8 through"),
    "dense beside": ({}, put(f"{Q}.weight", torch.zeros(128, 128)), r"q_proj has g_idx, .* and no weight, because"),
    "a bias": ({}, put(f"{DOWN}.bias", torch.ones(128)), r"down_proj\.bias has values other than 0"),
    "another layer": (
        {},
        put("model.layers.1.mlp.up_proj.qweight", torch.zeros(1).int()),
        r"unknown module model\.lay",
    ),
    "a quantised norm": ({}, put("model.norm.qweight", torch.zeros(1).int()), r"unknown module model\.norm"),
    "another kind": (
        {},
        put(f"{Q}.weight_packed", torch.zeros(1).int()),
        r"q_proj\.weight_packed is quantised by compressed-tensors; the configuration says gptq",
    ),
    "bitsandbytes": ({}, put(f"{Q}.weight.absmax", torch.zeros(1)), "absmax is quantised by bitsandbytes; the config"),
}


@pytest.mark.parametrize("fault", GPTQ_FAULTS)
def test_tensors_that_contradict_the_configuration(fault, tmp_path):
    fields, change, message = GPTQ_FAULTS[fault]
    config = GPTQ | {"checkpoint_format": "gptq_v2"} | fields
    pack = lambda matrix: gptq(matrix, 4, "gptq_v2")  # noqa: E731
    write(tmp_path, config, pack, lambda shape: integers(shape, 4, 32), change or (lambda tensors: None))
    with pytest.raises(CheckpointError, match=rf"{tmp_path}/model\.safetensors: .*{message}"):
        loaded(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        Model.from_pretrained(tmp_path, device="cpu")


INT8 = scheme(8, "channel", "int-quantized")
PACKED = scheme(4, "channel", "pack-quantized", symmetric=False)
COMPRESSED_FAULTS = {
    "no scale": (INT8, drop(f"{Q}.weight_scale"), "q_proj has weight and no weight_scale"),
    "scales of groups": (
        INT8,
        put(f"{Q}.weight_scale", torch.ones(128, 2)),
        r"weight_scale has shape \(128, 2\); expected \(128, 1\) or \(128,\) .* per row",
    ),
    "fp8 in its place": (
        INT8,
        put(f"{Q}.weight", torch.ones(128, 128).to(torch.float8_e4m3fn)),
        r"q_proj\.weight has dtype F8_E4M3; expected I8",
    ),
    "a float in its place": (
        INT8,
        put(f"{Q}.weight", torch.ones(128, 128)),
        "q_proj.weight has dtype F32; expected I8",
    ),
    "int8 in place of fp8": (FP8, None, r"weight has dtype I8; expected F8_E4M3"),
    "codes of more bits": (
        scheme(4, "channel", "int-quantized"),
        None,
        "weight has codes -128 to 127; expected -8 to 7, of 4 bits",
    ),
    "zero points": (
        INT8,
        put(f"{Q}.weight_zero_point", torch.ones(128, 1).to(torch.int8)),
        "weight_zero_point has the zero point 129, and the configuration says symmetric; expected 128",
    ),
    "ignored": (INT8 | {"ignore": [Q]}, None, rf"{Q} is quantised; expected a dense one, because .*config\.json says"),
    "no zero points": (PACKED, drop(f"{Q}.weight_zero_point"), "and no weight_zero_point"),
    "no shape": (PACKED, drop(f"{Q}.weight_shape"), "and no weight_shape"),
    "another shape": (
        PACKED,
        put(f"{Q}.weight_shape", torch.tensor([128, 127])),
        r"is \[128, 127\]; expected \[128, 1",
    ),
    "int8": (
        PACKED,
        put(f"{Q}.weight", torch.ones(128, 128).to(torch.int8)),
        "has weight, weight_packed, .* and no weight, be",
    ),
}


@pytest.mark.parametrize("fault", COMPRESSED_FAULTS)
def test_compressed_tensors_that_contradict_the_configuration(fault, tmp_path):
    config, change, message = COMPRESSED_FAULTS[fault]
    if config is PACKED:
        pack, bits = lambda matrix: pack_quantized(matrix, 4, symmetric=False), 4
    else:
        pack, bits = lambda matrix: int_quantized(matrix, 8, symmetric=True), 8
    made = lambda shape: integers(shape, bits, -1, symmetric=bits == 8)  # noqa: E731
    write(tmp_path, config, pack, made, change or (lambda tensors: None))
    with pytest.raises(CheckpointError, match=rf"{tmp_path}/model\.safetensors: .*{message}"):
        loaded(tmp_path)


def test_weights_of_fp8_that_are_not_numbers(tmp_path):
    def made(name: str, shape: tuple[int, int]) -> dict[str, Tensor]:
        weight = torch.ones(shape)
        weight[3, 4] = torch.nan
        return {"weight": weight.to(torch.float8_e4m3fn), "weight_scale": torch.ones(shape[0], 1)}

    write_checkpoint(tmp_path, FP8, made)
    with pytest.raises(CheckpointError, match=r"proj\.weight has values that are NaN; expected finite weights"):
        loaded(tmp_path)


def test_a_configuration_and_no_quantised_tensors(tmp_path):
    write_checkpoint(tmp_path, GPTQ, lambda name, shape: {"weight": torch.zeros(shape)})
    with pytest.raises(CheckpointError, match=r"config\.json: says gptq, .*; expected quantised tensors, found only"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("part", ["qweight", "weight_scale", "codes"])
def test_quantised_tensors_and_no_configuration(part, tmp_path):
    write_checkpoint(tmp_path, None, lambda name, shape: {"weight": torch.zeros(shape), part: torch.zeros(1).int()})
    with pytest.raises(CheckpointError, match=rf"{part} is quantised by .* nothing of quantised weights \(no quant"):
        open_checkpoint(tmp_path)


def test_sizes_that_words_do_not_divide(tmp_path):
    """A row of 4-bit zero points of a matrix of 124 rows would end within a word."""
    config = GPTQ | {"checkpoint_format": "gptq_v2", "group_size": -1}
    pack = lambda matrix: gptq(matrix, 4, "gptq_v2")  # noqa: E731
    write(tmp_path, config, pack, lambda shape: integers(shape, 4, -1), intermediate_size=252)
    with pytest.raises(CheckpointError, match=r"\[\d+, \d+\]; .* whose words hold 8 codes; expected whole words"):
        open_checkpoint(tmp_path)


def test_the_configuration_says_how_large_it_is(tmp_path):
    """The sizes are CONFIG's, so that the tables of the packers and of the configuration cannot drift apart."""
    write(tmp_path, AWQ, awq, lambda shape: integers(shape, 4, 32))
    found = open_checkpoint(tmp_path).config
    assert (found.hidden_size, found.intermediate_size) == (CONFIG.hidden_size, CONFIG.intermediate_size)
    assert found.quantization.method == "awq"
