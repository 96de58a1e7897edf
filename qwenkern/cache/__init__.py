"""The paged key-value cache: pages for sequences, texts found again, the pages' memory, and the batch of one pass."""

from .allocator import BlockTable, PageAllocator
from .batch import Batch
from .paged_cache import PAGE_SIZE, PagedCache

__all__ = ["PAGE_SIZE", "Batch", "BlockTable", "PageAllocator", "PagedCache"]
