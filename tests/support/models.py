"""Small random models of ours, and the same weights in transformers."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from support.toy_tokenizer import CHAT_TEMPLATE, byte_library
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from qwenkern import Config, Model

TINY = Config(
    vocab_size=503,
    hidden_size=128,
    intermediate_size=176,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=512,
)


def tiny_model(config: Config = TINY, dtype: torch.dtype = torch.float32, **keywords: Any) -> Model:
    """A random model whose logits differ so much that its greedy text is varied."""
    model = Model.from_config(config, dtype=dtype, **{"device": "cpu"} | keywords)
    with torch.no_grad():
        for name, parameter in model.module.named_parameters():
            if not name.endswith("norm.weight"):
                parameter.mul_(5)
            else:
                parameter.add_(torch.linspace(-0.5, 0.5, len(parameter)).to(parameter))
    return model


def reference_model(model: Model, dtype: torch.dtype | None = None) -> Qwen2ForCausalLM:
    """transformers' model with the same weights, computed in ``dtype``. In our model's dtype it shares their memory."""
    config = model.config
    fields = {name: getattr(config, name) for name in _SHARED}
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling:
        rope |= {
            "rope_type": "yarn",
            "factor": config.rope_scaling.factor,
            "original_max_position_embeddings": config.rope_scaling.original_max_position_embeddings,
        }
    with torch.device("meta"):
        theirs = Qwen2ForCausalLM(Qwen2Config(**fields, rope_parameters=rope))
    dtype = dtype or model.dtype
    weights = {name: tensor.to(dtype) for name, tensor in unpacked(model).items()}
    theirs.load_state_dict(weights, strict=True, assign=True)
    # the buffers of the rotary embedding are not in the state
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config).to(model.device)
    return theirs.eval()


def in_other_orders(model: PreTrainedModel, count: int = 8) -> Iterator[PreTrainedModel]:
    """transformers' model, and copies that compute the same function with the hidden units in another order. Sums over
    hidden units then have other orders, so the copies show the effect of rounding in general."""
    yield model
    for seed in range(1, count):
        order = torch.randperm(model.config.hidden_size, generator=torch.Generator().manual_seed(seed))
        other = copy.deepcopy(model)
        for name, parameter in other.named_parameters():
            parameter.data = renumbered(name, parameter.data, order)
        yield other


def renumbered(name: str, parameter: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """A parameter of transformers' layers, or its gradient, with hidden units in this order."""
    if any(part in name for part in ("o_proj", "down_proj", "norm")):  # these parameters write hidden units
        return parameter[order]
    return parameter[:, order] if name.endswith("weight") else parameter  # the others read hidden units


def unpacked(model: Model) -> dict[str, torch.Tensor]:
    """The weights under the names and in the shapes of a Hugging Face checkpoint."""
    config, weights = model.config, {}
    sizes = [config.q_size, config.kv_size, config.kv_size]
    for name, tensor in model.module.state_dict().items():
        if "qkv_proj" in name:
            weights |= {name.replace("qkv", part): rows for part, rows in zip("qkv", tensor.split(sizes), strict=True)}
        elif "gate_up_proj" in name:
            weights |= {
                name.replace("gate_up", part): rows for part, rows in zip(("gate", "up"), tensor.chunk(2), strict=True)
            }
        else:
            weights[name] = tensor
    return weights


_SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
)


def save_checkpoint(model: Model, folder: Path) -> None:
    """Writes a folder as on the hub: config.json, model.safetensors, tokenizer.json, chat template."""
    config = model.config
    fields = {name: getattr(config, name) for name in _SHARED}
    dtype = str(model.dtype).removeprefix("torch.")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(
        json.dumps({"model_type": "qwen2", "rope_theta": config.rope_theta, "torch_dtype": dtype, **fields})
    )
    weights = {name: tensor.contiguous() for name, tensor in unpacked(model).items()}
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors")
    byte_library().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
