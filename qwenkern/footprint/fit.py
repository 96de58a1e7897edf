"""Refuses a model that does not fit into memory, before a weight is read. The error has the numbers."""

from __future__ import annotations

import torch

from ..cache import PAGE_SIZE
from ..errors import RequestError
from .layout import Layout
from .memory import Memory, memory_of


def refuse_too_large(
    layout: Layout, device: torch.device, source: str, cache_tokens: int | None = None, mapped: int = 0
) -> None:
    """Raises RequestError if the weights and the least other memory of a model are more than the device's memory.

    It refuses only models that would certainly fail. cache_tokens: the requested size of the cache, if any; on a CPU
    only one page counts, because a page takes memory when it is first used. mapped: bytes of the weights that stay in a
    mapped file, which the system can drop from memory at any time."""
    least, memory = layout.least(), memory_of(device)
    pages = layout.pages_for(cache_tokens) if cache_tokens and layout.on_gpu else 1
    cache = layout.cache(pages)
    needed = least.total - least.cache + cache - mapped
    if needed > memory.available:
        raise RequestError(
            f"{source}: does not fit on {device}: weights {_gb(least.weights - mapped)}, a cache of "
            f"{pages * PAGE_SIZE} tokens {_gb(cache)}, activations {_gb(least.activations)}: {_gb(needed)}, "
            f"and {_of(memory)}; expected a smaller model or cache, or quantised weights"
        )


def _of(memory: Memory) -> str:
    if memory.available == memory.total:
        return f"there are {_gb(memory.total)}"
    return f"{_gb(memory.available)} of {_gb(memory.total)} are free"


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
