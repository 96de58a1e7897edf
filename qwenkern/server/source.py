"""Where a model of a server comes from: what loads it, and what memory it takes."""

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

TOGETHER = 8  # sequences whose decode steps are compiled and captured before the first request
SHARE = 0.9  # of the memory that is free when a server starts: what models may take together by default


@dataclass(frozen=True)
class Size:
    """What a model takes. tokens: of its cache; None: as many as Model.from_pretrained chooses."""

    bytes: int
    tokens: int | None


@dataclass(frozen=True)
class Source:
    """A model that can be loaded.

    size: gets the most bytes that it may take, and says what it takes. load: gets the tokens of its cache. Both get a
    function that is told of the progress, and that may raise to end the work."""

    size: Callable[[int | None, Progress], Size]
    load: Callable[[int | None, Progress], Model]

    @classmethod
    def of(cls, load: Callable[[], Model]) -> Source:
        """A model that a function gives. Its memory does not count."""
        return cls(lambda most, progress: Size(0, None), lambda tokens, progress: load())


def source(model: str | Path, **options: Any) -> Source:
    """A checkpoint. model and options: as those of Model.from_pretrained."""

    def size(most: int | None, progress: Progress) -> Size:
        return size_of(model, most, progress, **options)

    def load(tokens: int | None, progress: Progress) -> Model:
        loaded = Model.from_pretrained(model, progress=progress, **(options | {"cache_tokens": tokens}))
        if loaded.device.type == "cuda":  # on a CPU the first request loses nothing by it
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
    """What a checkpoint takes, as `qwenkern footprint` says, without the process. Downloads it if it is not here.

    most: bytes that it may take. If it is given and cache_tokens is not, the cache holds one context, or as many tokens
    as there is room for beside the weights; without ``most`` it has the size that Model.from_pretrained chooses, and
    one context counts. Raises RequestError if the model does not fit ``most``, and as Model.from_pretrained does."""
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
    """The bytes that models may take together where nobody says how many."""
    place = choose_device(device)
    if place.type == "cuda":
        return int(SHARE * memory_of(place).available)
    return max(0, int(SHARE * main_memory()) - OF_A_PROCESS)
