"""Takes outputs from the thread that steps to the coroutines of an event loop.

Waking an event loop costs a system call and a turn of the interpreter's lock, so many outputs share one: those that
come until the loop has woken.
"""

from __future__ import annotations

import asyncio
import weakref
from collections import deque

from .engine import Output

Inbox = asyncio.Queue[Output | None]


class Post:
    """The outputs that an event loop has not seen yet."""

    def __init__(self, callers: asyncio.AbstractEventLoop) -> None:
        self._callers = weakref.ref(callers)
        self._outputs: deque[tuple[Inbox, Output]] = deque()
        self._is_woken = False

    def put(self, inbox: Inbox, output: Output) -> None:
        """Called by the thread that steps. Raises RuntimeError if the event loop is closed."""
        callers = self._callers()
        if callers is None or callers.is_closed():
            raise RuntimeError("the caller's event loop is closed")
        self._outputs.append((inbox, output))
        if not self._is_woken:
            self._is_woken = True  # first: the loop may deliver at once
            callers.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._is_woken = False  # first: what is put from here on wakes the loop again
        while self._outputs:
            inbox, output = self._outputs.popleft()
            inbox.put_nowait(output)


_posts: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Post] = weakref.WeakKeyDictionary()


def post_of(callers: asyncio.AbstractEventLoop) -> Post:
    """That of an event loop, which all engines share."""
    return _posts.setdefault(callers, Post(callers))
