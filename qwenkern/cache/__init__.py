"""The paged key-value cache: allocation of pages, prefix index, the pages' memory, and the batch of a forward pass."""

from .allocator import BlockTable, PageAllocator
from .batch import Batch
from .paged_cache import PAGE_SIZE, PagedCache

__all__ = ["PAGE_SIZE", "Batch", "BlockTable", "PageAllocator", "PagedCache"]
