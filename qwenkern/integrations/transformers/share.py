"""Makes qwenkern's model from a loaded Qwen2ForCausalLM of transformers, on the same memory.

Embedding, norms, o_proj, down_proj and lm_head are shared without a change. qwenkern packs q, k, v into one tensor, and
gate, up into another. Packed tensors are made one at a time, and transformers' parameters become views of their rows.
So only one packed tensor at a time takes extra memory. Afterwards, a change to a weight of one model is a change to
both.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...allocation import allocate
from ...checkpoint.packing import EMBEDDING, HEAD, check_shapes, slots
from ...config import Config
from ...errors import CheckpointError, RequestError
from ...generation import Generation
from ...qwen2 import Qwen2
from ...text.tokenizer import Tokenizer

CLASS = "Qwen2ForCausalLM"
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def shared_module(model: Any) -> Qwen2:
    """qwenkern's module on the weights of transformers' model, whose q, k, v, gate and up become views of packed
    tensors.

    Raises ConfigError for a configuration that is not supported. Raises RequestError for another architecture, and for
    weights that cannot be shared: quantised, on "meta", of several dtypes or devices, or not those of the
    configuration. After an error, transformers' model is unchanged."""
    if CLASS not in {each.__name__ for each in type(model).__mro__}:
        adapted = ": with adapters, the result of merge_and_unload()" if hasattr(model, "merge_and_unload") else ""
        raise RequestError(f"model is a {type(model).__name__}; expected a {CLASS} of transformers{adapted}")
    if getattr(model.config, "quantization_config", None) is not None:
        raise RequestError("the model is quantised; expected weights of bfloat16, float16 or float32")
    weights = dict(model.named_parameters(remove_duplicate=False))
    dtype = _common(weights)
    config = Config.from_dict(model.config.to_dict(), source=f"the config of the {CLASS}")
    tied = config.tie_word_embeddings and _are_one(weights.get(EMBEDDING), weights.get(HEAD))
    config = replace(config, dtype=str(dtype).removeprefix("torch."), tie_word_embeddings=tied)
    _check(weights, config)
    module = Qwen2(config, dtype, torch.device("meta"))
    _share(module, weights)
    return module


def generation_defaults(model: Any) -> Generation:
    """The generation settings of the model's generation_config and config: the fields that differ from transformers'
    defaults, as transformers would save them. Raises ConfigError as Generation.from_fields does."""
    settings, width = getattr(model, "generation_config", None), model.config.vocab_size
    fields = {} if settings is None else settings.to_diff_dict()
    generation = Generation.from_fields(fields, width, f"the generation_config of the {CLASS}")
    return generation.with_ends(model.config.to_dict(), width, f"the config of the {CLASS}")


def as_tokenizer(tokenizer: Any, model: Any) -> Tokenizer | None:
    """Converts a fast tokenizer of transformers to a Tokenizer, through the files that it saves. Returns a Tokenizer
    and None unchanged."""
    if tokenizer is None or isinstance(tokenizer, Tokenizer):
        return tokenizer
    if not getattr(tokenizer, "is_fast", False):
        raise RequestError(
            f"tokenizer is a {type(tokenizer).__name__}; expected a fast tokenizer of transformers, a Tokenizer or None"
        )
    with tempfile.TemporaryDirectory(prefix=type(tokenizer).__name__) as folder:
        tokenizer.save_pretrained(folder)
        model.config.save_pretrained(folder)  # with the number of ids
        return Tokenizer.from_folder(folder)


def _common(weights: Mapping[str, nn.Parameter]) -> torch.dtype:
    """The common dtype of the weights. Raises RequestError if they have several dtypes or devices."""
    first, one = next(iter(weights.items()))
    for name, weight in weights.items():
        if weight.is_meta:
            raise RequestError(f"{name} is on the device meta; expected weights that are loaded")
        if weight.dtype not in _DTYPES:
            raise RequestError(f"{name} is {_named(weight.dtype)}; expected bfloat16, float16 or float32")
        if (weight.dtype, weight.device) != (one.dtype, one.device):
            raise RequestError(
                f"{name} is {_named(weight.dtype)} on {weight.device}, and {first} {_named(one.dtype)} on "
                f"{one.device}; expected one dtype and one device"
            )
        if weight.stride(-1) != 1:
            raise RequestError(f"{name} has strides {list(weight.stride())}; expected contiguous rows")
    return one.dtype


def _check(weights: Mapping[str, nn.Parameter], config: Config) -> None:
    try:
        check_shapes({name: tuple(weight.shape) for name, weight in weights.items()}, config, source=CLASS)
    except CheckpointError as error:
        raise RequestError(str(error)) from error


def _are_one(embedding: nn.Parameter | None, head: nn.Parameter | None) -> bool:
    """Whether embedding and head are the same parameter. If a checkpoint has both and they differ, transformers does
    not tie them, whatever the configuration says."""
    return embedding is None or head is None or embedding.data_ptr() == head.data_ptr()


def _share(module: Qwen2, weights: Mapping[str, nn.Parameter]) -> None:
    """Gives the module, whose parameters are on "meta", the memory of these weights."""
    names: dict[str, list[str]] = {}  # for each parameter of qwenkern, its parts in the order of their rows
    for name, slot in slots(module.config).items():
        names.setdefault(slot.parameter, []).append(name)
    for parameter, parts in names.items():
        parent, kind = parameter.rsplit(".", 1)
        whole = _packed([weights[part] for part in parts])
        setattr(module.get_submodule(parent), kind, nn.Parameter(whole, requires_grad=False))


def _packed(parts: Sequence[nn.Parameter]) -> Tensor:
    """One tensor with the rows of all parts. The parts become views of it, unless they are already, and their old
    memory is freed."""
    whole = _rows_of(parts)
    if whole is None:
        first = parts[0]
        shape = (sum(map(len, parts)), *first.shape[1:])
        whole = allocate(shape, first.dtype, first.device)
        for part, rows in zip(parts, whole.split([len(part) for part in parts]), strict=True):
            part.data = rows.copy_(part.data)
    return whole


def _rows_of(parts: Sequence[nn.Parameter]) -> Tensor | None:
    """The tensor whose rows these parts already are, or None. It exists for a single part, and for a model that was
    shared before."""
    first, at = parts[0].data, parts[0].data_ptr()
    if len(parts) == 1:
        return first
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same and part.is_contiguous() and part.data_ptr() == at):
            return None
        at += part.nbytes
    return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
