"""The size of the key-value cache of a loaded model."""

from __future__ import annotations

import torch

from ..arguments import whole
from ..cache import PAGE_SIZE
from ..errors import RequestError, shown
from .layout import OF_A_PROCESS, Layout
from .memory import main_memory, memory_of

_CONTEXTS_ON_A_GPU, _CONTEXTS_ON_A_CPU = 64, 4  # the most that a default cache holds


def cache_room(layout: Layout, device: torch.device, asked: int | None, prefill_chunk: int, weights: int) -> int:
    """The number of tokens in the key-value cache: the requested one, else a default. ``weights``: their bytes, which
    lie on the device already. Raises RequestError if the device's memory does not hold it."""
    asked = whole("cache_tokens", asked, 1, optional=True)
    if asked is None:
        return _default_tokens(layout, device, prefill_chunk, weights)
    # On a CPU of main memory and swap space, because memory is taken only when it is used.
    if (most := _tokens(layout, memory_of(device).available)) < asked:
        raise RequestError(f"cache_tokens is {shown(asked)}; all memory of {device} would hold {most}")
    return asked


def _default_tokens(layout: Layout, device: torch.device, prefill_chunk: int, weights: int) -> int:
    """On a GPU, where the weights lie already, the tokens that its free memory holds, less a reserve. The reserve is a
    tenth of the memory, or more: a twentieth and what a chunk of a prompt takes with all of its logits, if that is at
    most a quarter of the free memory. On a CPU, where memory is taken only when it is used, four contexts, but at most
    half of the main memory, and at most what weights of so many bytes leave of it.

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
    """In whole pages, beside the spare one."""
    return max(0, size // layout.page - 1) * PAGE_SIZE
