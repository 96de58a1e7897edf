"""Opens GGUF files of Qwen2.5: converts names to Hugging Face's, key-values to a Config, and blocks to tensors or
quantised weights.

Names: the standardized tensor names of the GGUF specification,
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Rows of q and k are in Hugging Face's order: llama.cpp
permutes them for Llama, not for Qwen2.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from qwenkern.config import Config
from qwenkern.errors import CheckpointError, shown
from qwenkern.generation import Generation
from qwenkern.kernels import Weight
from qwenkern.kernels.weights import Grouped

from .adjacent import Adjacent
from .base import Checkpoint
from .blocks import format_of
from .dequantize import dequantize, is_float, is_supported, supported
from .gguf_container import Container, TensorInfo
from .gguf_parts import read_parts
from .integers import meta
from .repack import Task, repack

logger = logging.getLogger(__name__)

_AT_ONCE = 16 << 20  # bytes of blocks that are repacked at a time
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
    """places: for each tensor, by Hugging Face's name, its file and its place in the file."""

    places: Mapping[str, tuple[Container, TensorInfo]] = field(repr=False)

    def tensors(self, dtype: torch.dtype, dense: bool = False) -> Iterator[tuple[str, torch.Tensor | Weight]]:
        """See Checkpoint.tensors. Every tensor is in new memory: blocks of matrices in `formats` are repacked, other
        tensors are converted."""
        if not dense:
            self._warn(dtype)
        allocated = Adjacent({} if dense else self.formats, self.config, dtype)
        found: dict[str, torch.Tensor | Weight] = {}  # not yielded yet
        tasks: list[Task] = []
        for name, (container, info) in self.places.items():
            blocks, source = container.blocks(info), f"{self.path}: tensor {info.name}"
            if name in self.formats and not dense:
                weight = allocated(name)
                assert isinstance(weight, Grouped)
                found[name] = weight
                tasks.append(Task(blocks, info.kind, weight, source))
            else:
                empty = torch.empty(info.shape, dtype=dtype, device="cpu")
                found[name] = dequantize(blocks, info.kind, empty, source)
            if not tasks or sum(task.blocks.nbytes for task in tasks) >= _AT_ONCE:
                repack(tasks)
                yield from found.items()
                found, tasks = {}, []
        repack(tasks)
        yield from found.items()

    def _warn(self, dtype: torch.dtype) -> None:
        """Warns of the memory that blocks take which become dense."""
        dense = {
            name: info
            for name, (_, info) in self.places.items()
            if name not in self.formats and len(info.shape) == 2 and not is_float(info.kind)
        }
        if dense:
            logger.warning(
                "%s: %d quantised matrices (%s of %s and the like) are dequantised to %s, because qwenkern has no "
                "kernels for their format or size: they take %.0f MB instead of %.0f, and longer to read",
                *(self.path, len(dense), *next((name, info.kind.name) for name, info in dense.items())),
                dtype,
                sum(math.prod(info.shape) for info in dense.values()) * dtype.itemsize / 1e6,
                sum(info.num_bytes for info in dense.values()) / 1e6,
            )


def _planned(info: TensorInfo) -> Grouped | None:
    """A weight of a tensor's format and size, on the meta device; None if qwenkern has no such weight."""
    form = format_of(info.kind)
    if form is None or len(info.shape) != 2:
        return None
    try:
        return form.allocate(*info.shape, torch.bfloat16, meta)
    except ValueError:  # a size that the format does not support
        return None


def open_gguf(path: Path) -> GgufCheckpoint:
    """Reads and checks the header of a GGUF file, or the headers of all parts of a split model.

    Raises CheckpointError, or ConfigError if its numbers cannot describe a model."""
    parts = read_parts(path)
    metadata = next(iter(parts.values())).metadata
    if (architecture := metadata.get("general.architecture")) != "qwen2":
        raise CheckpointError(f"{path}: general.architecture is {shown(architecture)}; expected 'qwen2'")
    places: dict[str, tuple[Container, TensorInfo]] = {}
    for file, container in parts.items():
        for info in container.tensors.values():
            if not is_supported(info.kind):
                names = ", ".join(supported())
                raise CheckpointError(f"{file}: tensor {info.name} has type {info.kind.name}; expected one of {names}")
            places[_hugging_face_name(info.name, file)] = container, info
    if "model.embed_tokens.weight" not in places:
        raise CheckpointError(f"{path}: has no tensor token_embd.weight")
    config = Config.from_gguf(
        metadata,
        vocab_size=places["model.embed_tokens.weight"][1].shape[0],
        tie_word_embeddings="lm_head.weight" not in places,
        source=str(path),
    )
    plans = {name: _planned(info) for name, (_, info) in places.items()}
    return GgufCheckpoint(
        path=path,
        config=config,
        generation=Generation.from_gguf(metadata, config.vocab_size, str(path)),
        metadata=metadata,
        shapes={name: info.shape for name, (_, info) in places.items()},
        formats={name: plan for name, plan in plans.items() if plan is not None},
        places=places,
    )


def _hugging_face_name(name: str, path: Path) -> str:
    match = re.fullmatch(r"(?:blk\.(0|[1-9][0-9]{0,5})\.)?(\w+)\.(weight|bias)", name, re.ASCII)
    layer, stem, kind = match.groups() if match else (None, None, None)
    known = _NAMES if layer is None else _LAYER_NAMES
    if stem in known:
        return f"{known[stem]}.{kind}" if layer is None else f"model.layers.{layer}.{known[stem]}.{kind}"
    if name.startswith("rope_freqs"):
        raise CheckpointError(
            f"{path}: tensor {name} scales rotary frequencies one by one; expected none, as in Qwen2.5 models"
        )
    raise CheckpointError(f"{path}: unknown tensor {name}; expected llama.cpp's names for a Qwen2 model")
