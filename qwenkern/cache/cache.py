"""The paged key-value cache, and the tables that say where the tokens of a forward pass belong."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import Config
from ..errors import RequestError
from ..rope import RopeTable

PAGE_SIZE = 64  # tokens; one tile of the attention kernels


@dataclass(frozen=True)
class Batch:
    """Tokens of several sequences, packed without padding: T tokens, S sequences, P pages in the longest table.

    The last token of sequence s is in row ``query_starts[s + 1] - 1`` and sees ``lengths[s]`` tokens, its own included.
    """

    ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    slots: Tensor  # [T] int64, where each token's key and value go
    block_tables: Tensor  # [S, P] int32
    lengths: Tensor  # [S] int32
    query_starts: Tensor  # [S + 1] int32
    is_decode: bool  # one token a sequence


class BlockTable:
    """The pages of one sequence, and how many of its tokens they hold."""

    def __init__(self) -> None:
        self.pages: list[int] = []
        self.length = 0


class PagedCache:
    """Keys and values of all layers: ``k`` and ``v`` are [layers, pages + 1, page_size, Hkv, D].

    A page belongs to one sequence, or is full and shared by sequences that began alike. The memory is not cleared, and
    on a CPU the operating system provides it only as pages are first written.

    Who has a page is said in one place, the tables: a page is free when no table that the cache lists names it. The
    list of free pages is derived from them, and anew once a table has been released, so that an exception at any line,
    such as a KeyboardInterrupt, loses no page for longer than its sequence lives. Whoever takes pages, or runs a pass,
    holds ``lock``; releasing them needs no lock."""

    def __init__(
        self, config: Config, num_tokens: int, dtype: torch.dtype, device: torch.device, page_size: int = PAGE_SIZE
    ) -> None:
        self.page_size = page_size
        self.num_pages = -(-num_tokens // page_size)
        self.spare_page = self.num_pages  # of nobody: for rows of a captured step that have no sequence
        shape = (config.num_hidden_layers, self.num_pages + 1, page_size, config.num_key_value_heads, config.head_dim)
        self.k = torch.empty(shape, dtype=dtype, device=device)
        self.v = torch.empty(shape, dtype=dtype, device=device)
        self.rope = RopeTable(config, self.num_pages * page_size, device)  # of the positions that its sequences reach
        self.lock = threading.Lock()  # one forward pass at a time, whoever shares the cache
        self.calls: dict[Any, None] = {}  # scheduler.Call: who shares it
        self._tables: set[BlockTable] = set()  # those that have pages
        self._free: list[int] = []  # free pages, but not all of them after a release
        self._released = True  # whether there may be more

    @property
    def num_tokens(self) -> int:
        return self.num_pages * self.page_size

    @property
    def num_free_tokens(self) -> int:
        return self.num_free_pages * self.page_size

    @property
    def num_free_pages(self) -> int:
        return self.num_pages - len(self._used())

    def has_room(self, num_pages: int) -> bool:
        """Whether so many pages are free. The caller holds the lock."""
        if num_pages > len(self._free) and self._released:
            self._released = False  # first: what is released meanwhile may be missed
            used = self._used()
            self._free = [page for page in range(self.num_pages - 1, -1, -1) if page not in used]
        return num_pages <= len(self._free)

    def missing_pages(self, table: BlockTable, num_tokens: int) -> int:
        """Pages that the sequence's next ``num_tokens`` need and it does not have yet."""
        return max(0, -(-(table.length + num_tokens) // self.page_size) - len(table.pages))

    def extend(self, table: BlockTable, num_tokens: int) -> None:
        """Gives the sequence the pages that its next ``num_tokens`` need, or raises RequestError and gives none. The
        caller holds the lock."""
        missing = self.missing_pages(table, num_tokens)
        if not missing:
            return
        if not self.has_room(missing):
            raise RequestError(
                f"the key-value cache has room for {self.num_free_tokens} more tokens of its {self.num_tokens}, and a "
                f"sequence needs {num_tokens} more: pass a larger cache_tokens to Model.from_pretrained"
            )
        self.rope.reach((len(table.pages) + missing) * self.page_size)  # first: a page without its angles would be used
        self._tables.add(table)
        pages = self._free[-missing:]
        del self._free[-missing:]
        table.pages += reversed(pages)

    def release(self, table: BlockTable) -> None:
        """Takes back every page that no other sequence shares, and empties the table. Needs no lock, since the garbage
        collector may be the one who calls it, in the middle of anything."""
        self._tables.discard(table)
        self._released = True
        table.pages, table.length = [], 0

    def recount(self) -> None:
        """Derives the free pages anew when they are next asked for."""
        self._released = True

    def holds(self, table: BlockTable) -> bool:
        """Whether a table has pages."""
        return table in self._tables

    def fork(self, table: BlockTable, copy: BlockTable) -> None:
        """Gives an empty table the same past: shares the full pages and copies the one that is still being filled. The
        caller holds the lock."""
        full, tail = divmod(table.length, self.page_size)
        self.extend(copy, tail)
        if tail:
            self.k[:, copy.pages[0]] = self.k[:, table.pages[full]]
            self.v[:, copy.pages[0]] = self.v[:, table.pages[full]]
        self._tables.add(copy)
        copy.pages[:0] = table.pages[:full]
        copy.length = table.length

    def _used(self) -> set[int]:
        return set().union(*[table.pages for table in list(self._tables)])

    def batch(self, parts: Sequence[tuple[BlockTable, Sequence[int]]]) -> Batch:
        """Makes room for the next token ids of some sequences and says where they go. When the forward pass has
        written them, call ``advance``."""
        for table, ids in parts:
            self.extend(table, len(ids))
        ids, positions, slots, lengths, query_starts = [], [], [], [], [0]
        for table, new in parts:
            end = table.length + len(new)
            ids += new
            positions += range(table.length, end)
            slots += [
                table.pages[at // self.page_size] * self.page_size + at % self.page_size
                for at in range(table.length, end)
            ]
            lengths.append(end)
            query_starts.append(len(ids))
        width = max(len(table.pages) for table, _ in parts)
        tables = [table.pages + [0] * (width - len(table.pages)) for table, _ in parts]
        device = self.k.device
        return Batch(
            ids=torch.tensor(ids, device=device),
            positions=torch.tensor(positions, device=device),
            slots=torch.tensor(slots, device=device),
            block_tables=torch.tensor(tables, dtype=torch.int32, device=device),
            lengths=torch.tensor(lengths, dtype=torch.int32, device=device),
            query_starts=torch.tensor(query_starts, dtype=torch.int32, device=device),
            is_decode=len(ids) == len(parts),
        )

    def advance(self, parts: Sequence[tuple[BlockTable, Sequence[int]]]) -> None:
        """Counts the tokens of a batch as cached."""
        for table, ids in parts:
            table.length += len(ids)
