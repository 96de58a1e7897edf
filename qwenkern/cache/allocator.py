"""Allocates the pages of the cache to sequences. Nothing here touches the pages' memory."""

from __future__ import annotations

from ..errors import RequestError


class BlockTable:
    """The pages of one sequence, and the number of its tokens in them."""

    def __init__(self) -> None:
        self.pages: list[int] = []
        self.length = 0


class PageAllocator:
    """Gives pages to sequences and takes them back.

    A page belongs to one sequence, or it is full and shared by sequences with the same beginning. Only the block tables
    say which pages are in use: a page is free if no listed table contains it. The list of free pages is computed from
    the tables, and computed again after a table was released. So if an exception interrupts any line (such as a
    KeyboardInterrupt), no page stays in use longer than its sequence lives."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size  # tokens
        self._tables: set[BlockTable] = set()  # the tables that have pages
        self._free: list[int] = []  # free pages; incomplete after a release
        self._released = True  # whether _free may be incomplete

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
        """Whether so many pages are free."""
        if num_pages > len(self._free) and self._released:
            self._released = False  # before reading the tables, because a page released meanwhile may be missed
            used = self._used()
            self._free = [page for page in range(self.num_pages - 1, -1, -1) if page not in used]
        return num_pages <= len(self._free)

    def holds(self, table: BlockTable) -> bool:
        """Whether a table has pages."""
        return table in self._tables

    def missing_pages(self, table: BlockTable, num_tokens: int) -> int:
        """The number of pages that the sequence lacks for its next ``num_tokens`` tokens."""
        return max(0, -(-(table.length + num_tokens) // self.page_size) - len(table.pages))

    def extend(self, table: BlockTable, num_tokens: int) -> None:
        """Gives the sequence the pages for its next ``num_tokens`` tokens. Raises RequestError, and gives none, if too
        few are free."""
        missing = self.missing_pages(table, num_tokens)
        if not missing:
            return
        if not self.has_room(missing):
            raise RequestError(
                f"the key-value cache has room for {self.num_free_tokens} more tokens of its {self.num_tokens}, and a "
                f"sequence needs {num_tokens} more: pass a larger cache_tokens to Model.from_pretrained"
            )
        self._tables.add(table)
        pages = self._free[-missing:]
        del self._free[-missing:]
        table.pages += reversed(pages)

    def fork(self, table: BlockTable, copy: BlockTable) -> None:
        """Makes an empty table a copy of another one. The copy shares the full pages, and gets a page of its own for
        the page that is partly full. Raises RequestError if there is no free page."""
        full, tail = divmod(table.length, self.page_size)
        self.extend(copy, tail)
        self._tables.add(copy)
        copy.pages[:0] = table.pages[:full]
        copy.length = table.length

    def release(self, table: BlockTable) -> None:
        """Empties the table. Its pages are free, except those that another sequence shares."""
        self._tables.discard(table)
        self._released = True
        table.pages, table.length = [], 0

    def recount(self) -> None:
        """Computes the free pages again when they are next needed."""
        self._released = True

    def _used(self) -> set[int]:
        return set().union(*[table.pages for table in list(self._tables)])
