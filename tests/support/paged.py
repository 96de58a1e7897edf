"""Paged caches for the tests of attention: pages in random order, with NaN wherever nothing may be read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from support.references import random
from torch import Tensor

from qwenkern.kernels.pages import DensePages


def paged_cache(
    lengths: Sequence[int],
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    dtype: torch.dtype,
    device: torch.device,
    spare_pages: int = 1,
) -> tuple[DensePages, Tensor, Tensor]:
    """pages, block_tables, lengths. Page 0 is all NaN, and every table has it after the sequence's own pages. On a last
    page, the tokens beyond the sequence's length are also NaN."""
    counts = [-(-length // page_size) for length in lengths]
    order = 1 + torch.randperm(sum(counts), generator=torch.Generator().manual_seed(1))
    shape = (1 + sum(counts), page_size, num_kv_heads, head_dim)
    k_pages, v_pages = (random(*shape, dtype=dtype, device=device, seed=seed) for seed in (11, 12))
    block_tables = torch.zeros(len(lengths), max(counts) + spare_pages, dtype=torch.int32)
    k_pages[0] = v_pages[0] = float("nan")
    for row, (length, pages) in enumerate(zip(lengths, order.split(counts), strict=True)):
        block_tables[row, : len(pages)] = pages
        if length % page_size:
            k_pages[pages[-1], length % page_size :] = v_pages[pages[-1], length % page_size :] = float("nan")
    lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
    return DensePages(k_pages, v_pages), block_tables.to(device), lengths
