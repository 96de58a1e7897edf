"""Makes the small files of a safetensors folder for a model from a GGUF file."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from ..checkpoint import Checkpoint
from ..config import Config
from ..generation import Generation
from ..text.tokenizer import Tokenizer

_SAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "tie_word_embeddings",
)


def config_fields(config: Config) -> dict[str, Any]:
    """The fields of a config.json with this configuration."""
    fields = {name: getattr(config, name) for name in _SAME}
    fields |= {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "torch_dtype": config.dtype}
    if config.rope_scaling is not None:
        fields["rope_scaling"] = {"rope_type": "yarn"} | asdict(config.rope_scaling)
    return fields


def small_files(checkpoint: Checkpoint, tokenizer: Tokenizer) -> dict[str, bytes]:
    """The other files, by name: generation_config.json and the tokenizer's files."""
    return {"generation_config.json": _json(_generation_fields(checkpoint.generation))} | tokenizer.files()


def _generation_fields(generation: Generation) -> dict[str, Any]:
    """The fields of a generation_config.json. A GGUF file with sampling settings always gives a temperature."""
    fields: dict[str, Any] = dict(generation.sampling)
    if fields:
        fields["do_sample"] = bool(fields["temperature"])
    if generation.end_ids:
        fields["eos_token_id"] = sorted(generation.end_ids)
    return fields


def _json(fields: dict[str, Any]) -> bytes:
    return (json.dumps(fields, indent=2) + "\n").encode()
