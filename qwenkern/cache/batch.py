"""The batch of one forward pass: its tokens and their slots in the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .allocator import BlockTable


@dataclass(frozen=True)
class Batch:
    """Tokens of several sequences, packed without padding: T tokens, S sequences, P pages in the longest table.

    The last token of sequence s is in row ``query_starts[s + 1] - 1`` and sees ``lengths[s]`` tokens, its own included.
    """

    ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    slots: Tensor  # [T] int64, the slot of each token's key and value
    block_tables: Tensor  # [S, P] int32
    lengths: Tensor  # [S] int32
    query_starts: Tensor  # [S + 1] int32
    is_decode: bool  # one token per sequence; in `one_by_one`, each row counts as a sequence

    @classmethod
    def of(cls, parts: Sequence[tuple[BlockTable, Sequence[int]]], page_size: int, device: torch.device) -> Batch:
        """The batch of the next token ids of some sequences, which already have the pages for these tokens."""
        ids: list[int] = []
        positions: list[int] = []
        slots, lengths, query_starts = [], [], [0]
        for table, new in parts:
            end = table.length + len(new)
            ids += new
            positions += range(table.length, end)
            slots += [table.pages[at // page_size] * page_size + at % page_size for at in range(table.length, end)]
            lengths.append(end)
            query_starts.append(len(ids))
        longest = max(len(table.pages) for table, _ in parts)
        tables = [table.pages + [0] * (longest - len(table.pages)) for table, _ in parts]
        return cls(
            ids=torch.tensor(ids, device=device),
            positions=torch.tensor(positions, device=device),
            slots=torch.tensor(slots, device=device),
            block_tables=torch.tensor(tables, dtype=torch.int32, device=device),
            lengths=torch.tensor(lengths, dtype=torch.int32, device=device),
            query_starts=torch.tensor(query_starts, dtype=torch.int32, device=device),
            is_decode=len(ids) == len(parts),
        )

    @classmethod
    def one_by_one(
        cls, parts: Sequence[tuple[BlockTable, Sequence[int]]], page_size: int, device: torch.device
    ) -> Batch:
        """The same tokens as rows of a decode step. Each row sees the tokens before it and counts as a sequence, so it
        has the same bits as in a step of its own."""
        rows = [
            (_at(table, position), [token]) for table, ids in parts for position, token in enumerate(ids, table.length)
        ]
        return cls.of(rows, page_size, device)


def _at(table: BlockTable, length: int) -> BlockTable:
    """A copy of the table with another number of tokens."""
    row = BlockTable()
    row.pages, row.length = table.pages, length
    return row
