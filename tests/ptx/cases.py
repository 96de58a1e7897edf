"""A small program with one fault, and without it."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
from numpy.typing import ArrayLike
from ptx.tiny_ptx import run

from qwenkern.benchmarks.offline.ptx.faults import Fault


class Case(NamedTuple):
    """``?`` in the body is where ``wrong`` stands, and ``right`` should."""

    name: str
    message: str
    body: str
    wrong: str
    right: str
    options: dict[str, Any] = {}  # noqa: RUF012 - it is never changed

    def check(self, prelude: str, *buffers: ArrayLike, **options: Any) -> None:
        """It runs as it should be, and with the fault that is reported."""
        assert self.body.count("?") == 1
        options |= self.options
        run(prelude + self.body.replace("?", self.right), *buffers, **options)
        with pytest.raises(Fault, match=self.message):
            run(prelude + self.body.replace("?", self.wrong), *buffers, **options)
