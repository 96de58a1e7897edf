"""How the suite runs: the tests of a quick run, and which worker runs tests that belong together."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.selection import FEW, quick

TESTS = Path(__file__).parent


def test_a_quick_run_has_tests_of_every_room(request: pytest.FixtureRequest) -> None:
    """A quick run has a few cases of every collected folder, and of every test in it that is not slow."""
    chosen = quick(request.session.items)
    assert _rooms(chosen) == _rooms(request.session.items)
    counts: dict[str, int] = {}
    for item in chosen:
        counts[item.nodeid.partition("[")[0]] = counts.get(item.nodeid.partition("[")[0], 0) + 1
    assert max(counts.values()) <= FEW
    assert not [item for item in chosen if item.get_closest_marker("slow")]


def _rooms(items) -> set[str]:
    return {item.path.relative_to(TESTS).parts[0] for item in items}


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="one process runs everything")
@pytest.mark.xdist_group("one worker")
def test_a_group_stays_on_one_worker(request: pytest.FixtureRequest) -> None:
    """pytest 9.2 does not read what pytest-xdist 3.8 writes: then times are taken beside other tests, and what a whole
    file shares is made by each worker."""
    assert request.node.nodeid.endswith("@one worker")


def test_no_test_changes_the_time_of_other_threads() -> None:
    """`support.clock.set_clock` changes it for the modules under test."""
    patched = re.compile(r"""setattr\((["'](time|asyncio)\.|([a-z_]+\.)*(time|asyncio), )""")
    found = [str(file.relative_to(TESTS)) for file in TESTS.rglob("*.py") if patched.search(file.read_text())]
    assert not found


BARE = """
from importlib.machinery import PathFinder
import sys

actual = PathFinder.find_spec

def find_spec(name, path=None, target=None):
    if name == "kernels":
        path = [entry for entry in (sys.path if path is None else path) if "site-packages" not in entry]
    return None if name in ("gguf", "liger_kernel", "matplotlib") else actual(name, path, target)

PathFinder.find_spec = find_spec
"""


@pytest.mark.slow
def test_tests_are_collected_where_packages_are_missing(tmp_path: Path) -> None:
    """Also by `python -m pytest`, which puts the folder kernels/ on the path under its bare name."""
    (tmp_path / "bare.py").write_text(BARE)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "bare",
        "--collect-only",
        "-q",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        command,
        cwd=TESTS.parent,
        env=environment | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for module in ("test_decode.py", "test_qwen2.py", "test_linear.py"):
        assert module in done.stdout


LOSES_ITS_GPU = """
import os, pytest, sys

sys.path.insert(0, {tests!r})
from support.cuda_errors import EndsAfterCudaError

def pytest_configure(config):
    if os.environ.get("PYTEST_XDIST_WORKER") or not config.option.numprocesses:
        config.pluginmanager.register(EndsAfterCudaError(lambda: "LOST" in os.environ))
"""
THEIR_TESTS = """
import os, pytest

@pytest.mark.parametrize("number", range(12))
def test_other(number):
    assert "LOST" not in os.environ

def test_harmless():
    assert False, "the GPU is still there"

def test_illegal():
    os.environ["LOST"] = "1"
    assert False, "an illegal access"

@pytest.mark.parametrize("number", range(12))
def test_later(number):
    assert "LOST" not in os.environ
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_a_lost_gpu_ends_one_worker(tmp_path: Path, workers: int) -> None:
    """All other tests run, and the one that lost it is reported with its error. In one process nothing runs after it,
    since everything would fail."""
    (tmp_path / "conftest.py").write_text(LOSES_ITS_GPU.format(tests=str(TESTS)))
    (tmp_path / "test_theirs.py").write_text(THEIR_TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [*command, "-n", str(workers), str(tmp_path)], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert "an illegal access" in done.stdout
    failed = {line.split("::")[1].split()[0] for line in done.stdout.splitlines() if line.startswith("FAILED")}
    assert failed == {"test_harmless", "test_illegal"}, done.stdout
    assert f"{24 if workers else 12} passed" in done.stdout, done.stdout
