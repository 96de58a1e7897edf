"""Whether this thread records its calls of ops, to make them later (c/recorded_calls.py). Nothing of the package is
imported here, for checks and dispatch ask, too."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any


class CannotRecord(RuntimeError):
    """What runs while calls are recorded is more than calls that can be."""


_of_thread = threading.local()


def recorder() -> Any:
    """What records the calls of this thread, or None."""
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
