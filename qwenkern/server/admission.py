"""Limits waiting requests: their number, how long they wait, the bytes of their bodies, and the length of texts to
tokenize."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..Model import Model
from ..prompts import is_ids
from ..text.messages import size
from .errors import ApiError
from .settings import Bounds

CHARACTERS = 32  # most characters of a prompt per token of the context. Text has about 4 per token, blanks up to 128
SMALL = 2**16  # first bytes of each body, which do not count: large bodies must not keep ordinary requests out


class Place:
    """The place of one turn in the queue. The turn holds it until its requests start or end."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self.since = time.monotonic()
        self.has_started: Callable[[], bool] = lambda: False

    def leave(self) -> None:
        """Gives the place up. May be called several times."""
        self._admission.places.pop(self, None)


class Admission:
    """The queue of turns that wait to start."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self.places: dict[Place, None] = {}  # in order of arrival

    def enter(self) -> Place:
        """A place for one more turn. Raises ApiError 429 if too many wait."""
        for place in [each for each in self.places if each.has_started()]:
            place.leave()
        if len(self.places) >= self._bounds.waiting:
            now = time.monotonic()
            oldest = max((now - place.since for place in self.places), default=0.0)  # how long a start takes now
            seconds = max(1, min(math.ceil(oldest), 60))
            raise ApiError(
                429,
                f"{len(self.places)} requests wait already; expected at most {self._bounds.waiting}: try again later",
                code="queue_full",
                headers={"Retry-After": str(seconds)},
            )
        self.places[place := Place(self)] = None
        return place

    def too_long(self) -> ApiError:
        """The error of a turn that has waited too long."""
        return ApiError(
            503,
            f"the request has waited for {self._bounds.waiting_seconds:g} s without starting: the server is busy",
            code="waited_too_long",
            headers={"Retry-After": "10"},
        )


class Bodies:
    """Counts and limits the bytes of all bodies in memory."""

    def __init__(self, bounds: Bounds) -> None:
        self._most = bounds.bodies_bytes
        self.held = 0

    @contextmanager
    def one(self) -> Iterator[Callable[[int], None]]:
        """Counts one body until the end of the with statement. Yields a function: the caller passes it the number of
        bytes received so far, and it raises ApiError 429 if all bodies together have too many."""
        mine = 0

        def grow(size: int) -> None:
            nonlocal mine
            more = max(0, size - SMALL) - mine
            if self.held + more > self._most:
                message = f"the bodies of all requests have more than {self._most} bytes together: try again later"
                raise ApiError(429, message, code="queue_full", headers={"Retry-After": "5"})
            self.held, mine = self.held + more, mine + more

        try:
            yield grow
        finally:
            self.held -= mine


def check_length(model: Model, *parts: Any) -> None:
    """Raises ApiError 400 for a prompt that is certainly longer than the context: the tokenizer would take seconds.

    parts: texts, messages, tools. Token ids do not count."""
    found = sum(len(part) if isinstance(part, str) else 0 if is_ids(part) else size(part) for part in parts)
    length = model.config.context_length
    if found > CHARACTERS * length:
        message = f"the prompt has {found} characters, and the context length is {length} tokens"
        message += f"; expected at most {CHARACTERS * length} characters"
        raise ApiError(400, message, code="context_length_exceeded")
