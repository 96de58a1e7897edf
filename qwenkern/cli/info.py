"""The output of `qwenkern info`: the sizes of a model, contradictions in its numbers, and how this CPU computes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from ..checkpoint.packing import EMBEDDING, HEAD, slots
from ..config import FAMILY, Config
from ..errors import RequestError
from ..footprint import Layout
from ..kernels import c as c_backend
from ..kernels.triton_if_any import triton

_SIZE_IN_NAME = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)B(?![a-z])", re.IGNORECASE)
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "tie_word_embeddings",
)


def show(model: str, kept: Layout, licence: str | None, warnings: Sequence[str]) -> None:
    """Prints the sizes of a model, its memory as it would be loaded here, this CPU, and contradictions."""
    config = kept.config
    table = Table(title=f"{model}: {config.num_parameters:,} parameters", title_justify="left")
    table.add_column("part")
    table.add_column("parameters", justify="right")
    for name, count in layout(config).items():
        table.add_row(name, f"{count:,}")
    forms = Table(title="Weights in memory", title_justify="left")
    forms.add_column("format")
    forms.add_column("bytes", justify="right")
    for name, size in kept.weights_by_format.items():
        forms.add_row(name, f"{size:,}")
    sizes = Table(title=f"Memory: weights as above, cache in {kept.cache_name}", title_justify="left")
    for column in ("context", "weights + cache of one sequence"):
        sizes.add_column(column, justify="right")
    for length, size in memory(kept).items():
        sizes.add_row(f"{length:,}", f"{size / 1e9:,.2f} GB")
    out = Console(highlight=False)
    out.print(
        f"{config.num_hidden_layers} layers, hidden {config.hidden_size}, FFN {config.intermediate_size}, "
        f"{config.num_attention_heads} query and {config.num_key_value_heads} key-value heads of {config.head_dim}, "
        f"vocabulary {config.vocab_size:,}{', tied' if config.tie_word_embeddings else ''}, "
        f"context {config.context_length:,}{', YaRN' if config.rope_scaling else ''}"
    )
    out.print(table, forms, sizes, f"weights: {kept.weights:,} bytes; cache: {kept.token:,} bytes a token")
    if licence:
        out.print(f"licence: {licence}")
    for name, value in processor().items():
        out.print(f"{name}: {value}")
    for warning in warnings:
        out.print(f"[yellow]contradiction:[/] {warning}")


def layout(config: Config) -> dict[str, int]:
    """The number of parameters by their purpose; their sum is ``config.num_parameters``."""
    layers, hidden = config.num_hidden_layers, config.hidden_size
    parts = {
        "embedding (and output)" if config.tie_word_embeddings else "embedding": config.num_embedding_parameters,
        "q, k, v projections": layers * (hidden + 1) * config.qkv_size,
        "attention output": layers * hidden * config.q_size,
        "gate and up projections": layers * 2 * hidden * config.intermediate_size,
        "down projection": layers * hidden * config.intermediate_size,
        "norms": (2 * layers + 1) * hidden,
    }
    if not config.tie_word_embeddings:
        parts["output"] = config.num_embedding_parameters
    return parts


def memory(layout: Layout) -> dict[int, int]:
    """Bytes of the weights and of one sequence's cache, by context length: powers of two, up to the model's own."""
    longest = layout.config.context_length
    lengths = [1 << n for n in range(10, 24) if 1 << n < longest] + [longest]
    return {length: layout.weights + layout.cache(layout.pages_for(length)) for length in lengths}


def processor() -> dict[str, str]:
    """The version of Triton, and of the C functions: their target, their origin, their threads, and the measurements on
    this CPU.

    Raises RequestError if QWENKERN_CPU_TARGET or QWENKERN_THREADS is wrong."""
    try:
        return {"Triton": triton.__version__ or "not installed, so torch runs on a GPU"} | c_backend.describe()
    except ValueError as error:
        raise RequestError(str(error)) from None


def renewed() -> dict[str, str]:
    """Repeats the measurements of this CPU. Returns the new results as in ``processor``, with the earlier ones.

    Raises RequestError if QWENKERN_CPU_TARGET or QWENKERN_THREADS is wrong."""
    try:
        found = c_backend.renew()
    except ValueError as error:
        raise RequestError(str(error)) from None
    return {
        name: f"{now}, as before" if before and now.startswith(before) else f"{now}, before: {before or 'nothing'}"
        for name, (now, before) in found.items()
    }


def contradictions(
    config: Config,
    name: str = "",
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    num_tokens: int | None = None,
) -> list[str]:
    """A sentence for each contradiction between two numbers; empty for a consistent checkpoint.

    name: of the model, which may state a size. shapes: of the checkpoint's tensors. num_tokens: how many ids the
    tokenizer can produce."""
    found = [
        *_against_name(config, name),
        *_against_itself(config),
        *(_against_tensors(config, shapes) if shapes is not None else ()),
    ]
    if num_tokens is not None and num_tokens > config.vocab_size:
        found.append(f"the tokenizer has ids up to {num_tokens - 1}; vocab_size is {config.vocab_size}")
    return found


def _against_name(config: Config, name: str) -> list[str]:
    stated = _SIZE_IN_NAME.search(name)
    if not stated:
        return []
    key = f"qwen2.5-{stated[1]}b"
    published = FAMILY[key].num_parameters if key in FAMILY else float(stated[1]) * 1e9
    found = []
    if abs(config.num_parameters - published) > 0.05 * published:
        found.append(
            f"the name says {stated[0][:20]}, and the configuration makes {config.num_parameters:,} parameters"
        )
    if key in FAMILY:
        for field in _SIZES:
            ours, theirs = getattr(config, field), getattr(FAMILY[key], field)
            if ours != theirs:
                found.append(f"{field} is {ours}, and Qwen2.5-{stated[1]}B has {theirs}")
    return found


def _against_itself(config: Config) -> list[str]:
    found = []
    if config.q_size != config.hidden_size:
        found.append(
            f"{config.num_attention_heads} query heads of {config.head_dim} make {config.q_size}; hidden_size is "
            f"{config.hidden_size}"
        )
    yarn = config.rope_scaling
    if yarn is not None:
        original, stretched = yarn.original_max_position_embeddings, config.context_length
        if config.max_position_embeddings not in (original, stretched):
            found.append(
                f"max_position_embeddings is {config.max_position_embeddings}; YaRN stretches {original} to {stretched}"
            )
    return found


def _against_tensors(config: Config, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    expected = {name: slot.shape for name, slot in slots(config).items()}
    if config.tie_word_embeddings and EMBEDDING not in shapes:  # a tied model may have either of the two
        expected[HEAD] = expected.pop(EMBEDDING)
    found = [
        f"tensor {name} has shape {tuple(shapes[name])}; the configuration makes it {shape}"
        for name, shape in expected.items()
        if name in shapes and tuple(shapes[name]) != shape
    ]
    if missing := [name for name in expected if name not in shapes]:
        found.append(f"{len(missing)} tensors of the configuration are not in the file, {missing[0]} first")
    if unknown := [name for name in shapes if name not in expected and not name.endswith("inv_freq")]:
        found.append(f"{len(unknown)} tensors of the file are not in the configuration, {unknown[0]} first")
    return found
