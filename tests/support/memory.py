"""The memory of a process that does nothing else: in a worker of pytest, the threads of other tests allocate, too."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from qwenkern.allocation import give_back

STATM = Path("/proc/self/statm")
needs_resident = pytest.mark.skipif(not STATM.exists(), reason="the system does not say what a process holds")


def resident() -> int:
    """The resident memory of this process in bytes."""
    gc.collect()
    give_back()
    return int(STATM.read_text().split()[1]) * 4096


def in_a_process(file: str, call: str) -> None:
    """Makes a call of a function of a test file in a process of its own, which must not fail."""
    path = [str(Path(__file__).parents[1]), str(Path(file).parent)]
    module = Path(file).stem
    code = f"import sys; sys.path[:0] = {path!r}; import {module}; {module}.{call}"
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr
