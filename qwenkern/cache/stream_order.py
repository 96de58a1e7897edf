"""Orders the passes that threads launch in different CUDA streams."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class StreamOrder:
    """A context for each pass on a device. What its thread launches in its current stream runs after the work of the
    pass before, in whatever stream that was.

    The passes of a model share pages, captured steps and their memory. Its lock orders only the launches. The caller
    holds the cache's lock. ``current_stream`` returns the current stream of a device."""

    def __init__(
        self, device: torch.device, current_stream: Callable[[torch.device], Any] = torch.cuda.current_stream
    ) -> None:
        self._device, self._current_stream = device, current_stream
        self._stream: Any = None  # of the latest pass
        self._end: Any = None  # the event at its end; None while it is launched, or if an exception ended it early

    def __enter__(self) -> None:
        stream = self._current_stream(self._device)
        if self._stream is not None and self._stream != stream:
            if self._end is None:
                stream.wait_stream(self._stream)
            else:
                stream.wait_event(self._end)
        self._stream, self._end = stream, None

    def __exit__(self, *_: object) -> None:
        self._end = self._stream.record_event()
