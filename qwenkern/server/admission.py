"""Bounds the requests that wait: how many, for how long, the bytes of their bodies, and the texts to be tokenised."""

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

CHARACTERS = 32  # of a prompt for each token of the context, at most: a text has about 4, blanks alone up to 128
SMALL = 2**16  # bytes of a body that count nowhere, so that large bodies keep no ordinary request away


class Place:
    """The place of a turn that waits, until it starts or ends."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self.since = time.monotonic()
        self.has_started: Callable[[], bool] = lambda: False

    def leave(self) -> None:
        """Ends the waiting. May be called several times."""
        self._admission.places.pop(self, None)


class Admission:
    """The turns that wait."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self.places: dict[Place, None] = {}  # in the order of their arrival

    def enter(self) -> Place:
        """A place for one more turn. Raises ApiError 429 if too many wait."""
        for place in [each for each in self.places if each.has_started()]:
            place.leave()
        if len(self.places) >= self._bounds.waiting:
            now = time.monotonic()
            oldest = max((now - place.since for place in self.places), default=0.0)  # it may be about to start
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
    """The bytes of all bodies in memory."""

    def __init__(self, bounds: Bounds) -> None:
        self._most = bounds.bodies_bytes
        self.held = 0

    @contextmanager
    def one(self) -> Iterator[Callable[[int], None]]:
        """Counts one body until the end of the with statement. Gives a function that is told its bytes so far, which
        raises ApiError 429 if all bodies together have too many."""
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
    """Raises ApiError for a prompt that surely does not fit the context, because a tokenizer takes seconds for it.

    parts: texts, messages, tools. Token ids are not counted."""
    found = sum(len(part) if isinstance(part, str) else 0 if is_ids(part) else size(part) for part in parts)
    length = model.config.context_length
    if found > CHARACTERS * length:
        message = f"the prompt has {found} characters, and the context length is {length} tokens"
        message += f"; expected at most {CHARACTERS * length} characters"
        raise ApiError(400, message, code="context_length_exceeded")
