"""The key-value cache: the pages, their memory, and the rotary angles of all positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..config import Config
from ..kernels import Pages
from ..kernels.pages import DensePages
from ..rope import RopeTable
from .allocator import BlockTable, PageAllocator
from .batch import Batch

PAGE_SIZE = 64  # tokens; one tile of the attention kernels


class PagedCache(PageAllocator):
    """Keys and values of all layers. ``pages`` has the pages of each layer (kernels/pages/), with one spare page each.

    The memory is not initialised. On a CPU the operating system provides memory only when a page is first written.

    Only one engine at a time uses a cache, in the thread that steps the engine."""

    def __init__(
        self,
        config: Config,
        num_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        page_size: int = PAGE_SIZE,
        pages: type[Pages] = DensePages,
    ) -> None:
        super().__init__(-(-num_tokens // page_size), page_size)
        self.dtype = dtype
        self.spare_page = self.num_pages  # for rows of a captured step that have no sequence
        shape = (self.num_pages + 1, page_size, config.num_key_value_heads, config.head_dim)
        self.pages = [pages.allocate(*shape, dtype, device) for _ in range(config.num_hidden_layers)]
        self.device = self.pages[0].device
        self.rope = RopeTable(config, self.num_tokens, device)  # angles for the positions that sequences have reached

    def extend(self, table: BlockTable, num_tokens: int) -> None:
        missing = self.missing_pages(table, num_tokens)
        if not missing:
            return
        if self.has_room(missing):  # before pages are given: their positions need rotary angles
            self.rope.reach((len(table.pages) + missing) * self.page_size)
        super().extend(table, num_tokens)

    def fork(self, table: BlockTable, copy: BlockTable) -> None:
        super().fork(table, copy)
        full, tail = divmod(table.length, self.page_size)
        if tail:
            for layer in self.pages:
                layer.copy_page(copy.pages[full], table.pages[full])

    def batch(self, parts: Sequence[tuple[BlockTable, Sequence[int]]]) -> Batch:
        """Gives some sequences the pages for their next token ids, and returns the batch. After the forward pass, call
        ``advance``. Raises RequestError if the cache has no room."""
        for table, ids in parts:
            self.extend(table, len(ids))
        return Batch.of(parts, self.page_size, self.device)

    def advance(self, parts: Sequence[tuple[BlockTable, Sequence[int]]]) -> None:
        """Counts the tokens of a batch as cached."""
        for table, ids in parts:
            table.length += len(ids)
