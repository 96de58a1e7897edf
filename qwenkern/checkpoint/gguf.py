"""GGUF files of Qwen2.5: llama.cpp's names -> Hugging Face's, its key-values -> a Config, its blocks -> tensors.

Names: the standardized tensor names of the GGUF specification,
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Rows of q and k are in Hugging Face's order: llama.cpp
permutes them for Llama, not for Qwen2.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from qwenkern.config import Config
from qwenkern.errors import CheckpointError
from qwenkern.generation import Generation

from .base import Checkpoint
from .dequantize import SUPPORTED, dequantize
from .gguf_container import Container, TensorInfo, read_container

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True)
class GgufCheckpoint(Checkpoint):
    """infos: where each tensor is in the container, under Hugging Face's names."""

    container: Container = field(repr=False)
    infos: Mapping[str, TensorInfo] = field(repr=False)

    def tensors(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """See Checkpoint.tensors. Every tensor is dequantized into new memory."""
        for name, info in self.infos.items():
            weights = torch.empty(info.shape, dtype=dtype, device="cpu")
            yield name, dequantize(self.container.blocks(info), info.kind, weights)


def open_gguf(path: Path) -> GgufCheckpoint:
    """Reads and checks the header of a .gguf file. Raises CheckpointError; ConfigError if no model has its numbers."""
    container = read_container(path)
    metadata = container.metadata
    if (architecture := metadata.get("general.architecture")) != "qwen2":
        raise CheckpointError(f"{path}: general.architecture is {architecture!r}; expected 'qwen2'")
    if (parts := metadata.get("split.count", 1)) not in (0, 1):
        raise CheckpointError(
            f"{path}: is one of {parts} parts of a model; "
            "merge them first: llama-gguf-split --merge FIRST_PART WHOLE.gguf"
        )
    infos = {_hugging_face_name(info.name, path): info for info in container.tensors.values()}
    for info in container.tensors.values():
        if info.kind not in SUPPORTED:
            names = ", ".join(kind.name for kind in sorted(SUPPORTED))
            raise CheckpointError(f"{path}: tensor {info.name} has type {info.kind.name}; expected one of {names}")
    embedding = infos.get("model.embed_tokens.weight")
    if embedding is None:
        raise CheckpointError(f"{path}: has no tensor token_embd.weight")
    config = Config.from_gguf(
        metadata, vocab_size=embedding.shape[0], tie_word_embeddings="lm_head.weight" not in infos, source=str(path)
    )
    return GgufCheckpoint(
        path=path,
        config=config,
        generation=Generation.from_gguf(metadata, config.vocab_size, str(path)),
        metadata=metadata,
        shapes={name: info.shape for name, info in infos.items()},
        container=container,
        infos=infos,
    )


def _hugging_face_name(name: str, path: Path) -> str:
    match = re.fullmatch(r"(?:blk\.(0|[1-9][0-9]{0,5})\.)?(\w+)\.(weight|bias)", name, re.ASCII)
    layer, stem, kind = match.groups() if match else (None, None, None)
    known = _NAMES if layer is None else _LAYER_NAMES
    if stem in known:
        return f"{known[stem]}.{kind}" if layer is None else f"model.layers.{layer}.{known[stem]}.{kind}"
    if name.startswith("rope_freqs"):
        raise CheckpointError(
            f"{path}: tensor {name} scales rotary frequencies one by one, which no Qwen2.5 model does"
        )
    raise CheckpointError(f"{path}: unknown tensor {name}; expected llama.cpp's names for a Qwen2 model")
