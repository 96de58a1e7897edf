"""Defines which rows of which parameter each tensor of a checkpoint becomes, and copies the tensors there.

The model multiplies by q, k and v at once, and by gate and up at once. Checkpoints store them separately. `_PACKED`
describes this, the only difference between the model's parameters and the checkpoint's tensors.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qwenkern.allocation import allocate
from qwenkern.config import Config
from qwenkern.errors import CheckpointError
from qwenkern.kernels import Weight
from qwenkern.kernels.weights import Dense, as_weight, joined

logger = logging.getLogger(__name__)

# The model's name in a layer -> the checkpoint's names, in the order of the rows.
_PACKED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_IGNORED = ".rotary_emb.inv_freq"  # in some old checkpoints; the configuration has the same values
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_COMPARED_ROWS = 8192


@dataclass(frozen=True)
class Slot:
    """The place of a tensor of `shape`: the rows of `parameter` from `start` on."""

    parameter: str
    shape: tuple[int, ...]
    start: int = 0


def slots(config: Config) -> dict[str, Slot]:
    """The place of every tensor of a checkpoint with this configuration, by Hugging Face's name."""
    hidden, ffn, q_rows, kv_rows = config.hidden_size, config.intermediate_size, config.q_size, config.kv_size
    layer = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (q_rows, hidden),
        "self_attn.k_proj.weight": (kv_rows, hidden),
        "self_attn.v_proj.weight": (kv_rows, hidden),
        "self_attn.q_proj.bias": (q_rows,),
        "self_attn.k_proj.bias": (kv_rows,),
        "self_attn.v_proj.bias": (kv_rows,),
        "self_attn.o_proj.weight": (hidden, q_rows),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (ffn, hidden),
        "mlp.up_proj.weight": (ffn, hidden),
        "mlp.down_proj.weight": (hidden, ffn),
    }
    in_layer = {name: Slot(name, shape) for name, shape in layer.items()}
    for packed, parts in _PACKED.items():
        for kind in ("weight", "bias"):
            start = 0
            for name in (f"{part}.{kind}" for part in parts):
                if name in layer:
                    in_layer[name] = Slot(f"{packed}.{kind}", layer[name], start)
                    start += layer[name][0]
    table = {
        EMBEDDING: Slot(EMBEDDING, (config.vocab_size, hidden)),
        "model.norm.weight": Slot("model.norm.weight", (hidden,)),
    }
    if not config.tie_word_embeddings:
        table[HEAD] = Slot(HEAD, (config.vocab_size, hidden))
    for i in range(config.num_hidden_layers):
        prefix = f"model.layers.{i}."
        for name, slot in in_layer.items():
            table[prefix + name] = Slot(prefix + slot.parameter, slot.shape, slot.start)
    return table


def check_shapes(shapes: Mapping[str, tuple[int, ...]], config: Config, source: str) -> None:
    """Raises CheckpointError unless these are the tensors of `config`. Called before the module is allocated."""
    if config.num_hidden_layers > len(shapes):
        raise CheckpointError(
            f"{source}: has {len(shapes)} tensors; expected those of a model of {config.num_hidden_layers} layers"
        )
    table = slots(config)
    for name, shape in shapes.items():
        _slot(name, shape, table, source)
    _check_complete(shapes, table, source)


@torch.no_grad()
def load_weights(
    module: torch.nn.Module,
    config: Config,
    tensors: Iterable[tuple[str, torch.Tensor | Weight]],
    source: str,
) -> None:
    """Loads every tensor into the parameters of `module`, on its device. Dense tensors are copied, in the module's
    dtype. Linear layers may be allocated (qwen2.Linear) or not. A layer that gets a Weight takes its tensors over.

    If the configuration ties the output to the embedding, the tensors may have either of them, as in transformers, or
    both. If both are given and differ in the module's dtype, the output is untied, with a warning.

    tensors: (Hugging Face's name, tensor in bfloat16, float16 or float32, or a Weight of the module's dtype). source:
    the checkpoint's name in messages.
    Raises CheckpointError for a tensor that is unknown, missing, given twice, or of the wrong shape or dtype."""
    table = slots(config)
    matrices = _Matrices(module, table)
    seen: set[str] = set()
    tied_head: torch.Tensor | Weight | None = None
    for name, tensor in tensors:
        if name in seen:
            raise CheckpointError(f"{source}: tensor {name} is given twice")
        seen.add(name)
        if slot := _slot(name, tuple(tensor.shape), table, source):
            if isinstance(tensor, torch.Tensor) and tensor.dtype not in _DTYPES:
                expected = ", ".join(map(str, _DTYPES))
                raise CheckpointError(f"{source}: tensor {name} has dtype {tensor.dtype}; expected one of {expected}")
            if name in table:
                matrices.put(slot, tensor)
            else:
                tied_head = tensor  # compared at the end, because the embedding may come later
    _check_complete(seen, table, source)
    if tied_head is not None:
        if EMBEDDING not in seen:
            matrices.put(table[EMBEDDING], tied_head)
        elif not _is_same(matrices.value(EMBEDDING), tied_head):
            logger.warning(
                "%s: %s differs from %s, although the configuration says tie_word_embeddings; both are used",
                source,
                HEAD,
                EMBEDDING,
            )
            module.untie(matrices.alone(EMBEDDING, tied_head))  # type: ignore[operator]  # of qwen2.Qwen2


class _Matrices:
    """Loads tensors into a module's parameters. A matrix of several tensors is joined when the last of them comes."""

    def __init__(self, module: torch.nn.Module, table: Mapping[str, Slot]) -> None:
        self._module = module
        self._missing: dict[str, int] = {}  # parameter -> number of rows that are not loaded yet
        for slot in table.values():
            self._missing[slot.parameter] = self._missing.get(slot.parameter, 0) + slot.shape[0]
        self._parts: dict[str, dict[int, Weight]] = {}  # parameter -> first row -> the rows of a loaded tensor

    def put(self, slot: Slot, tensor: torch.Tensor | Weight) -> None:
        holder, kind = self._holder(slot.parameter)
        end = slot.start + slot.shape[0]
        if len(slot.shape) == 1:
            holder.get_parameter(kind).data[slot.start : end].copy_(tensor)
            return
        if isinstance(tensor, Weight):
            part = _on(tensor, holder.device)
        else:
            part = self._dense(holder).rows(slot.start, end)
            part.copy_(tensor)
        parts = self._parts.setdefault(slot.parameter, {})
        parts[slot.start] = part
        self._missing[slot.parameter] -= slot.shape[0]
        if not self._missing[slot.parameter] and not all(isinstance(each, Dense) for each in parts.values()):
            holder.value = joined([each for _, each in sorted(parts.items())])

    def value(self, parameter: str) -> Weight:
        weight: Weight = self._holder(parameter)[0].value
        return weight

    def alone(self, parameter: str, tensor: torch.Tensor | Weight) -> Weight:
        """A tensor as a weight with this parameter's device and dtype. A dense one is copied."""
        like = self.value(parameter)
        if isinstance(tensor, Weight):
            return _on(tensor, like.device)
        return Dense(allocate(tuple(tensor.shape), like.dtype, like.device).copy_(tensor))

    def _holder(self, parameter: str) -> tuple[Any, str]:
        """The module that has a parameter, and the parameter's name in this module."""
        owner, _, kind = parameter.rpartition(".")
        return self._module.get_submodule(owner), kind

    def _dense(self, holder: Any) -> Weight:
        """The dense weight of a linear layer, which is allocated if necessary."""
        weight: Weight = holder.value if holder.is_allocated else holder.allocate()
        return weight


def _on(weight: Weight, device: torch.device) -> Weight:
    moved: Weight = as_weight([tensor.to(device) for tensor in weight.tensors], weight.format)
    return moved


def unpacked(module: torch.nn.Module, config: Config) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the tensors of a module, as in a checkpoint: Hugging Face's name, and a view of the rows of a dense
    weight or the dequantised values of a quantised one."""
    for name, slot in slots(config).items():
        part = _part(module, slot)
        yield name, part.dequantise() if isinstance(part, Weight) else part


def _part(module: torch.nn.Module, slot: Slot) -> Weight | torch.Tensor:
    """The rows of a parameter that a tensor goes to."""
    owner, _, kind = slot.parameter.rpartition(".")
    holder: Any = module.get_submodule(owner)  # a class of qwen2.py, which is not imported here
    end = slot.start + slot.shape[0]
    if kind == "weight" and len(slot.shape) == 2:
        return holder.value.rows(slot.start, end)
    return holder.get_parameter(kind).data[slot.start : end]


def _slot(name: str, shape: tuple[int, ...], table: Mapping[str, Slot], source: str) -> Slot | None:
    """The place of a tensor; None if it is not needed. A tied lm_head has the place of the embedding."""
    if name.endswith(_IGNORED):
        return None
    slot = table.get(EMBEDDING if name == HEAD and HEAD not in table else name)
    if slot is None:
        raise CheckpointError(f"{source}: unknown tensor {name[:200]}; expected the {len(table)} of a Qwen2.5 model")
    if shape != slot.shape:
        raise CheckpointError(f"{source}: tensor {name} has shape {shape}; expected {slot.shape}")
    return slot


def _check_complete(found: Container[str], table: Mapping[str, Slot], source: str) -> None:
    stands_in = {EMBEDDING} if HEAD in found and HEAD not in table else set()
    if missing := [name for name in table if name not in found and name not in stands_in]:
        raise CheckpointError(
            f"{source}: {len(missing)} of {len(table)} tensors are missing: {_summary(missing, table)}"
        )


def _is_same(weight: Weight, other: torch.Tensor | Weight) -> bool:
    """Whether `other`, in the dtype of `weight`, has the same bits. Compares a few rows at a time, to avoid a copy."""
    if isinstance(weight, Dense) != isinstance(other, torch.Tensor):
        return False
    if isinstance(other, Weight):
        return weight.format == other.format and all(map(_same_bits, weight.tensors, other.tensors))
    return _same_bits(weight.tensors[0], other)


def _same_bits(parameter: torch.Tensor, tensor: torch.Tensor) -> bool:
    if parameter.shape != tensor.shape or not parameter.numel():
        return parameter.shape == tensor.shape
    pairs = zip(parameter.split(_COMPARED_ROWS), tensor.split(_COMPARED_ROWS), strict=True)
    return all(torch.equal(a.view(torch.uint8), b.to(a).contiguous().view(torch.uint8)) for a, b in pairs)


def _summary(missing: Iterable[str], table: Mapping[str, Slot]) -> str:
    """The names as text: whole layers as ranges, then the first few other names ("layers 20..23,
    model.norm.weight")."""
    names: list[str] = []
    layers: dict[int, list[str]] = {}
    for name in missing:
        match = re.match(r"model\.layers\.(\d+)\.", name)
        layers.setdefault(int(match[1]), []).append(name) if match else names.append(name)
    per_layer = sum(name.startswith("model.layers.0.") for name in table)
    whole = [i for i in sorted(layers) if len(layers[i]) == per_layer]
    for i in sorted(layers.keys() - set(whole)):
        names += layers[i]
    runs: list[list[int]] = []
    for i in whole:
        if runs and runs[-1][1] == i - 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    parts = [f"layer {a}" if a == b else f"layers {a}..{b}" for a, b in runs] + names
    return ", ".join(parts[:6]) + (", ..." if len(parts) > 6 else "")
