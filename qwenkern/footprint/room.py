"""Chooses the size of the key-value cache of a loaded model."""

from __future__ import annotations

import torch

from ..arguments import whole
from ..cache import PAGE_SIZE
from ..errors import RequestError, shown
from .layout import OF_A_PROCESS, Layout
from .memory import main_memory, memory_of

_CONTEXTS_ON_A_GPU, _CONTEXTS_ON_A_CPU = 64, 4  # the most context lengths that a default cache holds


def cache_room(layout: Layout, device: torch.device, asked: int | None, prefill_chunk: int, weights: int) -> int:
    """The number of tokens in the key-value cache: the requested number, else a default. ``weights``: the bytes of the
    weights, which are on the device already. Raises RequestError if the cache does not fit into the device's memory."""
    asked = whole("cache_tokens", asked, 1, optional=True)
    if asked is None:
        return _default_tokens(layout, device, prefill_chunk, weights)
    # On a CPU this includes swap space, because a page takes memory only when it is used.
    if (most := _tokens(layout, memory_of(device).available)) < asked:
        raise RequestError(f"cache_tokens is {shown(asked)}; expected at most {most}: {device} has no more memory")
    return asked


def _default_tokens(layout: Layout, device: torch.device, prefill_chunk: int, weights: int) -> int:
    """The default number of tokens.

    On a GPU, where the weights are already: as many as fit into the free memory less a reserve, but at most 64 context
    lengths. The reserve is the larger of two sizes: a tenth of the memory, and a twentieth of the memory plus the
    activations of a prompt chunk with all of its logits. The second is limited to a quarter of the free memory.

    On a CPU, where a page takes memory only when it is used: four context lengths, but at most half of the main memory,
    and at most the main memory that the weights and the process leave.

    Raises RequestError if a GPU has no room for a page."""
    if layout.on_gpu:
        memory = memory_of(device)
        chunk = layout.activations(prefill_chunk, rows=prefill_chunk, positions=0)
        reserve = max(memory.total // 10, min(memory.total // 20 + chunk, memory.free // 4))
        size, contexts = memory.free - reserve, _CONTEXTS_ON_A_GPU
    else:
        whole = main_memory()
        size = max(min(whole // 2, whole - weights - OF_A_PROCESS), layout.cache(1))
        contexts = _CONTEXTS_ON_A_CPU
    if size < layout.cache(1):
        raise RequestError(
            f"{device} has no memory left for a key-value cache: {size / 1e9:.2f} GB without a reserve, and a page "
            f"takes {layout.cache(1) / 1e9:.2f} GB; expected a smaller model"
        )
    return min(_tokens(layout, size), contexts * layout.config.context_length)


def _tokens(layout: Layout, size: int) -> int:
    """The tokens in ``size`` bytes, in whole pages, beside the spare page."""
    return max(0, size // layout.page - 1) * PAGE_SIZE
