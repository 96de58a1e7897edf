"""Steps an engine in a background thread, for callers in any thread or coroutine.

    caller ─► call: add ───────────────► engine ─► step ─► step ─► ...      (background thread)
       ▲                                             │
       └──── outputs ◄── inbox of the call ◄─────────┘

The thread starts with the first request, sleeps while there are no requests, and stops with the loop. Signals such as
Ctrl-C reach callers only, never this thread.
"""

from __future__ import annotations

import asyncio
import atexit
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from queue import SimpleQueue
from typing import TypeVar

from ..errors import EngineError, RequestError
from .engine import Engine, Output
from .post import Inbox, post_of
from .request import Request, with_siblings

Sink = Callable[[Output], object]  # takes the outputs of a request; the background thread calls it
T = TypeVar("T")
PATIENCE = 10.0  # seconds that `close` waits for the step in progress


class Loop:
    """Runs the requests of many callers on one engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._sinks: dict[Request, Sink] = {}  # of the requests that have not ended
        self._lock = threading.Lock()  # held while the thread is started
        self._only = threading.Lock()  # held by the thread that steps
        self._wake: SimpleQueue[None] = SimpleQueue()  # not an Event: the garbage collector may call abort within `put`
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []  # the one that steps
        self._finalizer = weakref.finalize(self, _tell_to_stop, self._stop, self._wake)
        _loops.add(self)

    def add(self, requests: Sequence[Request], sink: Sink) -> None:
        """Adds requests and their siblings. ``sink`` gets their outputs, until each has ended or is aborted.

        Raises RequestError or EngineError as Engine.add."""
        self._check_open()
        group = with_siblings(requests)
        try:
            for each in group:
                self._sinks[each] = sink
            self.engine.add(*requests)
        except BaseException:  # an interrupt may come after the engine has them
            for each in group:
                self.abort(each)
            raise
        self._run()

    def between_passes(self, work: Callable[[], T]) -> T:
        """Makes the background thread call ``work`` between two steps. Returns its result or raises its error."""
        result = self.submit(work)
        while not wait([result], PATIENCE).done:
            self._check_open()
        return result.result()

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Makes the background thread call ``work`` between two steps, and does not wait for its result."""
        self._check_open()
        result: Future[T] = Future()

        def run() -> None:
            if not result.set_running_or_notify_cancel():
                return
            try:
                result.set_result(work())
            except BaseException as error:
                result.set_exception(error)

        self.engine.between_passes(run)
        self._run()
        return result

    def abort(self, request: Request) -> None:
        """Ends a request. Its pages are free after the step in progress."""
        if request in self._sinks:  # in this order, so that abort may be called again after an interrupt
            if not request.has_ended:
                self.engine.abort(request)
                self._wake_thread()
            self._sinks.pop(request, None)

    def close(self) -> None:
        """Ends all requests with an error, and stops the thread after the step in progress."""
        try:
            self._finalizer()
            for thread in self._threads:
                if thread is not threading.current_thread() and thread.is_alive():
                    thread.join(PATIENCE)
        finally:
            self._end_all(EngineError("this model was closed before the request had ended"))

    def _check_open(self) -> None:
        if self._stop.is_set():
            raise EngineError("this model is closed; load it again")

    def _wake_thread(self) -> None:
        if self._wake.empty():
            self._wake.put(None)

    @property
    def is_idle(self) -> bool:
        return not self.engine.has_requests

    def _run(self) -> None:
        """Wakes the thread, or starts it if it does not run, such as in a forked process."""
        self._wake_thread()
        if any(thread.is_alive() for thread in self._threads):
            return
        with self._lock:
            if not any(thread.is_alive() for thread in self._threads):
                arguments = weakref.ref(self), self._wake, self._stop, self._only
                self._threads[:] = [threading.Thread(target=_steps, args=arguments, name="qwenkern", daemon=True)]
                _threads.add(self._threads[0])
                self._threads[0].start()

    def _step(self) -> None:
        for output in self.engine.step():
            self._tell(output)

    def _tell(self, output: Output) -> None:
        sink = self._sinks.get(output.request)
        if sink is None:  # aborted meanwhile
            return
        if output.is_last:
            self._sinks.pop(output.request, None)
        try:
            sink(output)
        except RuntimeError:  # the caller's event loop is closed
            self._sinks.pop(output.request, None)
            self.engine.abort(output.request)

    def _end_all(self, error: EngineError) -> None:
        if any(thread.is_alive() and thread is not threading.current_thread() for thread in self._threads):
            self.engine.fault = error  # a step that takes longer than PATIENCE still uses the engine
        else:
            self.engine.stop(error)
        for request in list(self._sinks):
            self._tell(Output(request, [], "", error=error.again()))


def _steps(loop_of: weakref.ref[Loop], wake: SimpleQueue[None], stop: threading.Event, only: threading.Lock) -> None:
    """The function of the thread. It holds a reference to the loop only while there are requests."""
    if not only.acquire(blocking=False):  # an interrupt within Thread.start may lead to a second thread
        return
    while True:
        wake.get()
        loop = loop_of()
        if loop is None or stop.is_set():
            return
        try:
            while loop.engine.has_requests and not stop.is_set():
                loop._step()
        except BaseException as error:  # otherwise callers would wait for ever
            fault = EngineError(f"the engine has stopped, load the model again: {type(error).__name__}: {error}")
            fault.__cause__ = error
            loop._end_all(fault)
        del loop


def _tell_to_stop(stop: threading.Event, wake: SimpleQueue[None]) -> None:
    stop.set()
    wake.put(None)


_loops: weakref.WeakSet[Loop] = weakref.WeakSet()
_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()  # of all loops, including those that were freed


@atexit.register
def _close_all() -> None:
    """Ends the threads before the interpreter ends, because a daemon thread must not run then."""
    for loop in list(_loops):
        loop.close()
    for thread in list(_threads):
        if thread.is_alive():
            thread.join(PATIENCE)


class _Call:
    """The requests of one caller in a loop."""

    def __init__(self, loop: Loop, requests: Sequence[Request], sink: Sink) -> None:
        self._loop = loop
        self._left = set(with_siblings(requests))  # those that have not ended
        try:
            loop.add(requests, sink)
        except BaseException:
            self._abort()
            raise

    def _seen(self, output: Output) -> Output:
        if output.is_last:
            self._left.discard(output.request)
        if output.error:
            self._abort()
            raise output.error
        return output

    def _abort(self) -> None:
        for request in list(self._left):
            self._loop.abort(request)
            self._left.discard(request)

    def __del__(self) -> None:
        if hasattr(self, "_left"):  # False if an interrupt ended __init__
            self._abort()


class Call(_Call):
    """The requests of one caller: an iterator of their outputs, which raises the first error.

    ``close``, the end of a with statement, an exception or the garbage collector abort requests that have not ended."""

    def __init__(self, loop: Loop, requests: Sequence[Request]) -> None:
        self._inbox: SimpleQueue[Output | None] = SimpleQueue()
        self._reading = threading.Lock()
        super().__init__(loop, requests, self._inbox.put)

    def __iter__(self) -> Call:
        return self

    def __next__(self) -> Output:
        if not self._reading.acquire(blocking=False):
            raise RequestError("another thread is reading this; expected one reader at a time")
        try:
            output = self._inbox.get() if self._left else None
            if output is None:  # all have ended, or another thread has closed the call
                raise StopIteration
            return self._seen(output)
        except BaseException:
            self.close()
            raise
        finally:
            self._reading.release()

    def __enter__(self) -> Call:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Aborts the requests that have not ended. Any thread may call this; a thread that reads then stops."""
        self._abort()
        self._inbox.put(None)


class AsyncCall(_Call):
    """A Call for a coroutine: an asynchronous iterator of the outputs. A cancelled task aborts its requests.

    only_last: each request gives its last output only, for a caller that waits for whole texts."""

    def __init__(self, loop: Loop, requests: Sequence[Request], only_last: bool = False) -> None:
        self._inbox = Inbox()
        put, inbox = post_of(asyncio.get_running_loop()).put, self._inbox  # not self: an unreferenced call must end

        def sink(output: Output) -> None:
            if output.is_last or not only_last:
                put(inbox, output)

        super().__init__(loop, requests, sink)

    def __aiter__(self) -> AsyncCall:
        return self

    async def __anext__(self) -> Output:
        outputs = self._inbox.outputs
        if self._left and not outputs:
            await self._wait()
        if not self._left:
            raise StopAsyncIteration
        return self._seen(outputs.popleft())

    async def take(self) -> list[Output]:
        """Waits for at least one output, and returns all that have come. Empty at the end. Outputs that came before an
        error are returned before it is raised."""
        outputs, found = self._inbox.outputs, list[Output]()
        if self._left and not outputs:
            await self._wait()
        while self._left and outputs and not (found and outputs[0].error):
            found.append(self._seen(outputs.popleft()))
        return found

    async def _wait(self) -> None:
        try:
            await self._inbox.wait()
        except RequestError:  # of a second reader
            raise
        except BaseException:
            self.close()
            raise

    async def __aenter__(self) -> AsyncCall:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Aborts the requests that have not ended. A coroutine that reads then stops."""
        self._abort()
        self._inbox.wake()
