"""Which pages of the cache are whose. Nothing here touches their memory."""

from __future__ import annotations

from ..errors import RequestError


class BlockTable:
    """The pages of one sequence, and how many of its tokens they hold."""

    def __init__(self) -> None:
        self.pages: list[int] = []
        self.length = 0


class PageAllocator:
    """Gives pages to sequences and takes them back.

    A page belongs to one sequence, or is full and shared by sequences that began alike. Who has a page is said in one
    place, the tables: a page is free when no table that the allocator lists names it. The list of free pages is derived
    from the tables, and again once a table has been released. So an exception at any line, such as a KeyboardInterrupt,
    loses no page for longer than its sequence lives."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size  # tokens
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
        """Whether so many pages are free."""
        if num_pages > len(self._free) and self._released:
            self._released = False  # first: what is released meanwhile may be missed
            used = self._used()
            self._free = [page for page in range(self.num_pages - 1, -1, -1) if page not in used]
        return num_pages <= len(self._free)

    def holds(self, table: BlockTable) -> bool:
        """Whether a table has pages."""
        return table in self._tables

    def missing_pages(self, table: BlockTable, num_tokens: int) -> int:
        """Pages that the sequence's next ``num_tokens`` need and it does not have yet."""
        return max(0, -(-(table.length + num_tokens) // self.page_size) - len(table.pages))

    def extend(self, table: BlockTable, num_tokens: int) -> None:
        """Gives the sequence the pages that its next ``num_tokens`` need, or raises RequestError and gives none."""
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
        """Gives an empty table the same past: it shares the full pages and gets one of its own for the page that is
        still being filled."""
        full, tail = divmod(table.length, self.page_size)
        self.extend(copy, tail)
        self._tables.add(copy)
        copy.pages[:0] = table.pages[:full]
        copy.length = table.length

    def release(self, table: BlockTable) -> None:
        """Takes back every page that no other sequence shares, and empties the table."""
        self._tables.discard(table)
        self._released = True
        table.pages, table.length = [], 0

    def recount(self) -> None:
        """Derives the free pages again when they are next asked for."""
        self._released = True

    def _used(self) -> set[int]:
        return set().union(*[table.pages for table in list(self._tables)])
