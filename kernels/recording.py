"""Whether this thread records its C calls for a later replay (c/recorded_calls.py). This file imports nothing of the
package, because checks.py and dispatch.py import it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any


class CannotRecord(RuntimeError):
    """A function that is recorded called something other than C functions whose calls can be recorded."""


_of_thread = threading.local()


def recorder() -> Any:
    """The object that records the calls of this thread, or None."""
    return getattr(_of_thread, "recorder", None)


def is_recording() -> bool:
    return getattr(_of_thread, "recorder", None) is not None


@contextlib.contextmanager
def recording(by: Any) -> Iterator[None]:
    _of_thread.recorder = by
    try:
        yield
    finally:
        _of_thread.recorder = None
