"""The paged key-value cache."""

from .cache import PAGE_SIZE, Batch, BlockTable, PagedCache

__all__ = ["PAGE_SIZE", "Batch", "BlockTable", "PagedCache"]
