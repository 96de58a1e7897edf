"""Bounds the requests that wait: how many, and for how long."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from .errors import ApiError
from .settings import Bounds


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
