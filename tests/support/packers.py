"""Writes quantised checkpoints from known integers, as the formats' specifications describe them: code by code and bit
by bit, in plain numpy. So an error in the reader is not repeated here."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from support.toy_tokenizer import byte_library
from torch import Tensor

from qwenkern import Config

CONFIG = Config(
    vocab_size=503,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=512,
)
LAYER = "model.layers.0."
MATRICES = {
    "self_attn.q_proj": (128, 128),
    "self_attn.k_proj": (64, 128),
    "self_attn.v_proj": (64, 128),
    "self_attn.o_proj": (128, 128),
    "mlp.gate_proj": (256, 128),
    "mlp.up_proj": (256, 128),
    "mlp.down_proj": (128, 256),
}  # [N, K]
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # the columns of a word's nibbles, the lowest first (AutoAWQ, WQLinear_GEMM)


@dataclass
class Integers:
    """A matrix: w[n, k] = scales[n, g] * (codes[n, k] - zeros[n, g]) with g = groups[k]."""

    codes: np.ndarray  # [N, K], from 0
    scales: Tensor  # [N, groups]
    zeros: np.ndarray  # [N, groups]
    groups: np.ndarray  # [K]

    def matrix(self) -> Tensor:
        """[N, K], float64."""
        zeros = torch.from_numpy(self.zeros.astype(np.float64))
        codes = torch.from_numpy(self.codes.astype(np.float64))
        return self.scales.double()[:, self.groups] * (codes - zeros[:, self.groups])


def integers(
    shape: tuple[int, int], bits: int, group: int, symmetric: bool = False, dtype=torch.float16, seed: int = 0
) -> Integers:
    """A random matrix that has every code and, unless it is symmetric, every zero point."""
    random, (rows, columns) = np.random.default_rng(seed + sum(shape)), shape
    count = columns // (columns if group == -1 else group)
    codes = random.integers(0, 1 << bits, shape)
    codes.flat[: 1 << bits] = np.arange(1 << bits)
    zeros = np.full((rows, count), 1 << bits - 1) if symmetric else random.integers(0, 1 << bits, (rows, count))
    scales = torch.from_numpy(random.uniform(0.5, 1.5, (rows, count)) * 0.1 / (1 << bits)).to(dtype)
    return Integers(codes, scales, zeros, np.arange(columns) // (columns // count))


def packed(codes: np.ndarray, bits: int, axis: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Packs codes into int32 words along an axis, the first code in the lowest bits, or in ``order`` within a word."""
    codes = np.moveaxis(codes, axis, -1)
    each = 32 // bits
    words = np.zeros((*codes.shape[:-1], -(-codes.shape[-1] // each)), np.uint64)
    for k in range(codes.shape[-1]):
        place = k % each if order is None else order.index(k % each)
        words[..., k // each] += codes[..., k].astype(np.uint64) << np.uint64(bits * place)
    assert words.max() < 1 << 32
    return torch.from_numpy(np.moveaxis(words, -1, axis).astype(np.uint32).view(np.int32).copy())


def gptq(matrix: Integers, bits: int, storage: str = "gptq") -> dict[str, Tensor]:
    zeros = matrix.zeros - (storage == "gptq")
    return {
        "qweight": packed(matrix.codes.T, bits, 0),
        "qzeros": packed(zeros.T & (1 << bits) - 1, bits, 1),
        "scales": matrix.scales.T.contiguous(),
        "g_idx": torch.from_numpy(matrix.groups.astype(np.int32)),
    }


def awq(matrix: Integers) -> dict[str, Tensor]:
    return {
        "qweight": packed(matrix.codes.T, 4, 1, AWQ_COLUMNS),
        "qzeros": packed(matrix.zeros.T, 4, 1, AWQ_COLUMNS),
        "scales": matrix.scales.T.contiguous(),
    }


def pack_quantized(matrix: Integers, bits: int, symmetric: bool) -> dict[str, Tensor]:
    tensors = {
        "weight_packed": packed(matrix.codes, bits, 1),
        "weight_scale": matrix.scales,
        "weight_shape": torch.tensor(matrix.codes.shape),
    }
    return tensors if symmetric else tensors | {"weight_zero_point": packed(matrix.zeros, bits, 0)}


def int_quantized(matrix: Integers, bits: int, symmetric: bool) -> dict[str, Tensor]:
    middle = 1 << bits - 1
    tensors = {"weight": torch.from_numpy(matrix.codes - middle).to(torch.int8), "weight_scale": matrix.scales}
    if symmetric:
        return tensors
    return tensors | {"weight_zero_point": torch.from_numpy(matrix.zeros - middle).to(torch.int8)}


def scheme(num_bits: int, strategy: str, format: str, **fields: Any) -> dict[str, Any]:
    """A quantization_config of compressed-tensors."""
    weights = {"num_bits": num_bits, "type": "int", "symmetric": True, "strategy": strategy, "dynamic": False}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights | fields, "input_activations": None}},
        "ignore": ["lm_head"],
    }


def write_checkpoint(
    folder: Path,
    quantization: Mapping[str, Any] | None,
    tensors: Callable[[str, tuple[int, int]], dict[str, Tensor]],
    change: Callable[[dict[str, Tensor]], None] = lambda tensors: None,
    **fields: Any,
) -> dict[str, Tensor]:
    """Writes a folder with random dense tensors and, for each of MATRICES, the tensors that ``tensors`` makes.
    ``change`` may alter all tensors. Returns the dense ones."""
    generator = torch.Generator().manual_seed(0)

    def dense(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).mul_(0.1).bfloat16()

    others = {
        "model.embed_tokens.weight": dense(503, 128),
        "lm_head.weight": dense(503, 128),
        "model.norm.weight": 1 + dense(128),
        f"{LAYER}input_layernorm.weight": 1 + dense(128),
        f"{LAYER}post_attention_layernorm.weight": 1 + dense(128),
        f"{LAYER}self_attn.q_proj.bias": dense(128),
        f"{LAYER}self_attn.k_proj.bias": dense(64),
        f"{LAYER}self_attn.v_proj.bias": dense(64),
    }
    everything = dict(others)
    for name, shape in MATRICES.items():
        everything |= {f"{LAYER}{name}.{part}": tensor for part, tensor in tensors(name, shape).items()}
    change(everything)
    config = dataclasses.asdict(CONFIG) | {"model_type": "qwen2", "torch_dtype": "float16"}
    for ours in ("dtype", "source", "quantization"):  # no fields of a config.json
        del config[ours]
    config |= {"quantization_config": quantization} | fields
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    byte_library().save(str(folder / "tokenizer.json"))
    save_file({name: tensor.contiguous() for name, tensor in everything.items()}, folder / "model.safetensors")
    return others
