"""A folder that the workers of one run share, for data that one of them makes for all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock


@contextlib.contextmanager
def one_worker_at_a_time(factory: pytest.TempPathFactory, name: str) -> Iterator[Path]:
    """The folder that the workers share. While one worker is in this context, the others wait."""
    own = factory.getbasetemp()
    folder = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    with FileLock(folder / f"{name}.lock"):
        yield folder
