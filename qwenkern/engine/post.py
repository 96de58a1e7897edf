"""Takes outputs from the thread that steps to the coroutines of an event loop.

Waking an event loop costs a system call and a turn of the interpreter's lock, so many outputs share one: those that
come until the loop has woken.
"""

from __future__ import annotations

import asyncio
import weakref
from collections import deque

from ..errors import RequestError
from .engine import Output


class Inbox:
    """The outputs of a call that its coroutine has not read yet. Used within the event loop only.

    An asyncio.Queue does the same, and takes several times as long for an output."""

    def __init__(self) -> None:
        self.outputs: deque[Output] = deque()
        self._reader: asyncio.Future[None] | None = None

    def put(self, output: Output) -> None:
        self.outputs.append(output)
        self.wake()

    def wake(self) -> None:
        """Ends the waiting of the reader, if there is one."""
        if self._reader and not self._reader.done():
            self._reader.set_result(None)

    async def wait(self) -> None:
        """Waits for an output, or for `wake`."""
        if self._reader:
            raise RequestError("another coroutine is reading this; expected one reader at a time")
        self._reader = asyncio.get_running_loop().create_future()
        try:
            await self._reader
        finally:
            self._reader = None


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
            inbox.put(output)


_posts: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Post] = weakref.WeakKeyDictionary()


def post_of(callers: asyncio.AbstractEventLoop) -> Post:
    """That of an event loop, which all engines share."""
    return _posts.setdefault(callers, Post(callers))
