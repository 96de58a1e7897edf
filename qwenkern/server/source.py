"""Sources of a server's models: how to load a model, and how much memory it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..cache import PAGE_SIZE
from ..device import choose_device
from ..errors import RequestError
from ..footprint import layout_of, memory_of
from ..footprint.layout import OF_A_PROCESS
from ..footprint.memory import main_memory
from ..loading import Progress, find
from ..Model import Model

TOGETHER = 8  # decode steps for up to this many sequences are compiled and captured before the first request
SHARE = 0.9  # default share of the memory free at the server's start that all models may take together


@dataclass(frozen=True)
class Size:
    """The memory of a model in bytes. tokens: of its cache; None: as many as Model.from_pretrained chooses."""

    bytes: int
    tokens: int | None


@dataclass(frozen=True)
class Source:
    """Two functions that measure and load a model.

    size: takes the most bytes that the model may take, and returns its Size. load: takes the tokens of its cache, and
    returns the model. Both also take a function that they call with their progress. It may raise to stop them."""

    size: Callable[[int | None, Progress], Size]
    load: Callable[[int | None, Progress], Model]

    @classmethod
    def of(cls, load: Callable[[], Model]) -> Source:
        """A model that a function returns. Its memory does not count towards the budget."""
        return cls(lambda most, progress: Size(0, None), lambda tokens, progress: load())


def source(model: str | Path, **options: Any) -> Source:
    """A checkpoint. model and options: as those of Model.from_pretrained."""

    def size(most: int | None, progress: Progress) -> Size:
        return size_of(model, most, progress, **options)

    def load(tokens: int | None, progress: Progress) -> Model:
        loaded = Model.from_pretrained(model, progress=progress, **(options | {"cache_tokens": tokens}))
        if loaded.device.type == "cuda":  # on a CPU, the first request is as fast without it
            loaded.warm_up(TOGETHER)
        return loaded

    return Source(size, load)


def size_of(
    model: str | Path,
    most: int | None = None,
    progress: Progress | None = None,
    *,
    cache_tokens: int | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    quantize: str | None = None,
    kv_cache_dtype: str | torch.dtype = "auto",
    prefill_chunk: int | None = None,
    draft: str | Path | None = None,
    **_others: Any,
) -> Size:
    """The memory that a checkpoint takes, as `qwenkern footprint` computes it, without that of the process. Downloads
    the checkpoint if it is not here.

    most: bytes that the model may take. With ``most`` and without cache_tokens, the cache holds one context, or as many
    tokens as fit beside the weights. Without both, Model.from_pretrained chooses the size of the cache, and the result
    counts one context. Raises RequestError if the model does not fit ``most``, and the errors of
    Model.from_pretrained."""
    place = choose_device(device)
    layouts = []
    for each in (model, draft):
        if each is not None:
            _, checkpoint = find(each, progress)
            layouts.append(
                layout_of(
                    checkpoint.config,
                    place,
                    quantize=quantize,
                    stored=checkpoint.formats,
                    dtype=dtype,
                    kv_cache_dtype=kv_cache_dtype if each is model else "auto",
                )
            )

    def taken(tokens: int) -> int:
        return sum(layout.footprint(tokens, 1, prefill_chunk).total - OF_A_PROCESS for layout in layouts)

    tokens = cache_tokens or layouts[0].config.context_length
    if most is not None and cache_tokens is None and taken(tokens) > most:
        low, high = 0, layouts[0].pages_for(tokens)  # pages: low fits, high does not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if taken(middle * PAGE_SIZE) <= most else (low, middle)
        tokens = max(1, low) * PAGE_SIZE
    found = taken(tokens)
    if most is not None and found > most:
        raise RequestError(
            f"the model takes {found / 1e9:.2f} GB with a cache of {tokens} tokens, and the models of this server may "
            f"take {most / 1e9:.2f} GB together; expected a smaller model or cache, or more memory for them"
        )
    return Size(found, tokens if most is not None else cache_tokens)


def free_memory(device: str | torch.device = "auto") -> int:
    """The bytes that all models may take together by default: SHARE of the free memory."""
    place = choose_device(device)
    if place.type == "cuda":
        return int(SHARE * memory_of(place).available)
    return max(0, int(SHARE * main_memory()) - OF_A_PROCESS)
