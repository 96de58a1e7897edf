"""Passes outputs from the engine's thread to the coroutines of an event loop.

Waking an event loop costs a system call and a switch of the interpreter's lock. So all outputs that come before the
loop has woken share one wake-up.
"""

from __future__ import annotations

import asyncio
import weakref
from collections import deque

from ..errors import RequestError
from .engine import Output


class Inbox:
    """The outputs of a call that its coroutine has not read yet. Used within the event loop only.

    An asyncio.Queue would do the same, but takes several times as long per output."""

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
        """Adds an output, from the engine's thread. Raises RuntimeError if the event loop is closed."""
        callers = self._callers()
        if callers is None or callers.is_closed():
            raise RuntimeError("the caller's event loop is closed")
        self._outputs.append((inbox, output))
        if not self._is_woken:
            self._is_woken = True  # before the call, because the loop may deliver at once
            callers.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._is_woken = False  # before the delivery: an output that is put from here on wakes the loop again
        while self._outputs:
            inbox, output = self._outputs.popleft()
            inbox.put(output)


_posts: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Post] = weakref.WeakKeyDictionary()


def post_of(callers: asyncio.AbstractEventLoop) -> Post:
    """The Post of an event loop. All engines share it."""
    return _posts.setdefault(callers, Post(callers))
