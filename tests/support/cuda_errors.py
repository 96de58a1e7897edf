"""Ends one worker, not the whole run, if a CUDA error leaves a process without its GPU."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch


def is_lost() -> bool:
    """Whether this process has lost its GPU. After an illegal access, every later call of the process fails."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


class EndsAfterCudaError:
    """Ends the process after a failed test because of which it lost the GPU, when the test's reports have been sent.
    With pytest-xdist, a new worker then runs the other tests, and the failed test is reported once more, as a crash."""

    def __init__(self, is_lost: Callable[[], bool] = is_lost) -> None:
        self._is_lost, self._has_failed = is_lost, False
        self._session: pytest.Session | None = None

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self._session = session

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._has_failed |= report.failed

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        if self._has_failed and self._is_lost():
            if "PYTEST_XDIST_WORKER" in os.environ:
                os._exit(3)
            if self._session is not None:
                self._session.shouldfail = f"{nodeid} lost the GPU by a CUDA error"
        self._has_failed = False


def register(config: pytest.Config) -> None:
    """Registers the plugin in processes that run tests, which the controller of pytest-xdist does not."""
    if "PYTEST_XDIST_WORKER" in os.environ or not getattr(config.option, "numprocesses", None):
        config.pluginmanager.register(EndsAfterCudaError())
