"""A second process in which Triton compiles, because the tests' process uses Triton's interpreter."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from unittest import mock


@contextlib.contextmanager
def compiling_process() -> Iterator[ProcessPoolExecutor]:
    """``submit(function, ...)`` runs there; functions and what they take and return are pickled."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        with mock.patch.dict(os.environ, {"QWENKERN_KERNELS": "triton", "OMP_NUM_THREADS": "1"}):
            os.environ.pop("TRITON_INTERPRET", None)
            process.submit(os.getpid).result()  # it is started here, and keeps its environment
        yield process
