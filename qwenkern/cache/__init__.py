"""The paged key-value cache: the allocation of pages to sequences, the pages' memory, and the batch of one pass."""

from .allocator import BlockTable, PageAllocator
from .batch import Batch
from .paged_cache import PAGE_SIZE, PagedCache

__all__ = ["PAGE_SIZE", "Batch", "BlockTable", "PageAllocator", "PagedCache"]
