"""Small random models of transformers that apply_qwenkern takes, and helpers that show a patch."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from qwenkern.integrations.transformers import layers

SIZES = {
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN2 = Qwen2ForCausalLM, Qwen2Config(**SIZES)
MODELS = {
    "qwen2": QWEN2,
    "qwen2 with windows": (
        Qwen2ForCausalLM,
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    ),
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "mistral": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=6)),
}
IDS = torch.randint(3, 211, (2, 9), generator=torch.Generator().manual_seed(0))
PADDED = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9])


def make(kind: tuple = QWEN2, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> PreTrainedModel:
    """A random model whose logits are far enough apart for greedy text to be interesting."""
    make_model, config = kind
    torch.manual_seed(0)
    model = make_model(copy.deepcopy(config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(8) if not name.endswith("norm.weight") else parameter.add_(torch.rand_like(parameter) - 0.5)
    model.set_attn_implementation(attention)
    return model.to(dtype)


def state(model: nn.Module) -> dict[str, Any]:
    """The class of each module and what lies in it."""
    return {name: (type(module), dict(vars(module))) for name, module in model.named_modules()}


def is_patched(model: nn.Module) -> bool:
    """Whether anything of a patch is left: a class of ours, or a forward in an instance."""
    return any(isinstance(module, layers.Patched) or "forward" in vars(module) for module in model.modules())
