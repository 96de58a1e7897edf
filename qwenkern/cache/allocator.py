"""Allocates the pages of the cache to sequences. This module does not access the pages' memory."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence

from ..errors import RequestError
from .prefix import Entry, Parent, PrefixIndex


class BlockTable:
    """The pages of one sequence, and the number of tokens in them."""

    def __init__(self, salt: str = "") -> None:
        self.pages: list[int] = []
        self.length = 0
        self.salt = salt  # only texts with the same salt share pages
        self.epoch = 0  # of the prefix index, when the sequence began
        self.num_indexed = 0  # pages that are in the prefix index
        self.last: Parent = salt  # the entry of the last indexed page


class PageAllocator:
    """Gives pages to sequences and takes them back.

    A page is in use while a table has it. Several tables may share a full page. When no table has a page any more,
    `find` still finds its tokens until another sequence needs the page. The least recently used page is given away
    first.

    One thread at a time may use an allocator, except for ``give_back``."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size  # tokens
        self.reset()

    def reset(self) -> None:
        """Makes all pages free, and forgets their content. The tables of sequences are not valid any more."""
        self._users = [0] * self.num_pages  # how many tables have each page
        self._free = list(range(self.num_pages - 1, -1, -1))
        self._kept: OrderedDict[int, None] = OrderedDict()  # pages without a table that can be found, the oldest first
        self._index = PrefixIndex()
        self._given_back: deque[BlockTable] = deque()
        self._version = 0  # of the weights that computed the pages that can be found
        self._epoch = 0  # how often all texts were forgotten

    @property
    def num_tokens(self) -> int:
        return self.num_pages * self.page_size

    @property
    def num_free_tokens(self) -> int:
        return self.num_free_pages * self.page_size

    @property
    def num_free_pages(self) -> int:
        """Pages without a table. Some of them may hold a text that can be found."""
        self._take_back()
        return len(self._free) + len(self._kept)

    @property
    def num_used_pages(self) -> int:
        """Pages that tables have. Any thread may read this."""
        return self.num_pages - len(self._free) - len(self._kept)

    @property
    def num_kept_pages(self) -> int:
        """Free pages whose text can be found."""
        self._take_back()
        return len(self._kept)

    def has_room(self, num_pages: int) -> bool:
        """Whether at least ``num_pages`` pages are free."""
        return num_pages <= self.num_free_pages

    def missing_pages(self, table: BlockTable, num_tokens: int) -> int:
        """The number of pages that the sequence lacks for its next ``num_tokens`` tokens."""
        return max(0, -(-(table.length + num_tokens) // self.page_size) - len(table.pages))

    def find(self, ids: Sequence[int], salt: str = "") -> list[Entry]:
        """The pages that hold the longest beginning of ``ids``, among texts with the same salt."""
        return self._index.find(salt, ids, self.page_size)

    def begin(self, table: BlockTable, found: Sequence[Entry], num_tokens: int) -> bool:
        """Gives an empty table the found pages, and more pages up to ``num_tokens`` tokens in all. Returns False, and
        gives no page, if too few are free."""
        to_come = max(0, num_tokens - len(found) * self.page_size)
        if -(-to_come // self.page_size) > self.num_free_pages - sum(entry.page in self._kept for entry in found):
            return False
        table.pages = [entry.page for entry in found]
        table.length = len(found) * self.page_size
        table.epoch, table.num_indexed = self._epoch, len(found)
        if found:
            table.last = found[-1].id
        for page in table.pages:
            self._kept.pop(page, None)
            self._users[page] += 1
        self.extend(table, to_come)
        return True

    def extend(self, table: BlockTable, num_tokens: int) -> None:
        """Gives the sequence the pages for its next ``num_tokens`` tokens. Raises RequestError, and gives no page, if
        too few are free."""
        missing = self.missing_pages(table, num_tokens)
        if not missing:
            return
        if not self.has_room(missing):
            raise RequestError(
                f"the key-value cache has room for {self.num_free_tokens} more tokens of its {self.num_tokens}, and a "
                f"sequence needs {num_tokens} more: pass a larger cache_tokens to Model.from_pretrained"
            )
        for _ in range(missing):
            page = self._free.pop() if self._free else self._evicted()
            self._users[page] = 1
            table.pages.append(page)

    def fork(self, table: BlockTable, copy: BlockTable) -> None:
        """Makes an empty table a copy of another one. The copy shares the full pages, and gets a page of its own for
        the page that is partly full. Raises RequestError if there is no free page."""
        full, tail = divmod(table.length, self.page_size)
        self.extend(copy, tail)
        copy.pages[:0] = table.pages[:full]
        for page in table.pages[:full]:
            self._users[page] += 1
        copy.length, copy.epoch, copy.num_indexed, copy.last = table.length, table.epoch, table.num_indexed, table.last

    def remember(self, table: BlockTable, ids: Sequence[int]) -> None:
        """Adds the full pages of a table to the prefix index. ``ids`` are the tokens in the table, as far as they are
        known. Does nothing for a sequence that began before the last `forget`."""
        if table.epoch != self._epoch:
            return
        size = self.page_size
        for at in range(table.num_indexed, min(table.length, len(ids)) // size):
            entry = self._index.add(table.last, ids[at * size : (at + 1) * size], table.pages[at])
            table.num_indexed, table.last = at + 1, entry.id

    def forget_if_changed(self, version: int) -> None:
        """Forgets all texts if weights of another version computed them."""
        if version != self._version:
            self.forget()
            self._version = version

    def forget(self) -> None:
        """Removes all pages from the prefix index."""
        self._epoch += 1
        self._free += self._kept
        self._kept.clear()
        self._index = PrefixIndex()

    def release(self, table: BlockTable) -> None:
        """Empties the table. Its pages are free, except those that another table has, too."""
        pages, table.pages = table.pages, []
        table.length, table.num_indexed, table.last = 0, 0, table.salt
        for page in reversed(pages):  # the end of a text is less useful than its beginning, so it counts as older
            self._users[page] -= 1
            if self._users[page]:
                continue
            if page in self._index:
                self._kept[page] = None
            else:
                self._free.append(page)

    def give_back(self, table: BlockTable) -> None:
        """Makes the thread that next uses the allocator release the table. Any thread may call this at any time, and
        also the garbage collector."""
        self._given_back.append(table)

    def _take_back(self) -> None:
        while self._given_back:
            self.release(self._given_back.popleft())

    def _evicted(self) -> int:
        page, _ = self._kept.popitem(last=False)
        self._index.forget(page)
        return page
