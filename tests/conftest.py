"""Fixtures of all tests: the real demo model, one thread per worker, and the device of the kernels' tests."""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch starts its threads; programs that tests start inherit it
    os.environ.setdefault("OMP_NUM_THREADS", "1")
if (
    not (  # if the library `kernels` is missing, neither tests/kernels nor the package's folder is taken for it
        found := PathFinder.find_spec(
            "kernels",
            [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parents[1]],
        )
    )
    or not found.has_location
):
    sys.modules["kernels"] = None
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # transformers is a reference here, and needs no network

import numpy as np
import torch
from support import cuda_errors
from support.selection import FEW, quick

if not torch.cuda.is_available():  # Triton reads its variable when it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")  # the kernels' tests run in the interpreter,
    os.environ.setdefault("QWENKERN_KERNELS", "reference")  # and all others on the torch reference

from qwenkern import kernels
from qwenkern.errors import CheckpointError
from qwenkern.hub import names

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    from support.interpreter import spare_useless_work

    spare_useless_work()

if importlib.util.find_spec("hypothesis"):
    from hypothesis import HealthCheck, settings

    # The same examples in each run, and no limit of time: a busy machine is no fault. tests/fuzz.py looks for new ones.
    settings.register_profile("suite", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("suite")

HAS_GPU = torch.cuda.is_available()


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)  # the workers share the cores
    if HAS_GPU:
        cuda_errors.register(config)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help=f"no slow test, and of each other at most {FEW} cases")
    parser.addoption("--ptx-all", action="store_true", help="all tests of the kernels on their PTX: hours")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("quick"):
        chosen = quick(items)
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = [item for item in items if item in chosen]
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)  # what takes long first, so that nobody waits
    if HAS_GPU:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch finds none"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    _seed()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    _seed()


def _seed() -> None:
    """Gives each test the same numbers from the generators of torch and numpy, whatever ran before it."""
    torch.default_generator.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(scope="session")
def demo_path() -> Path:
    """The demo model's file, pulled if it is absent. pytest keeps the outcome, also a skip, for the whole session."""
    try:
        return names.pull("demo")
    except CheckpointError as error:
        if os.environ.get("QWENKERN_REQUIRE_DEMO") == "1":
            pytest.fail(f"QWENKERN_REQUIRE_DEMO=1, and the demo model is not to be had: {error}")
        pytest.skip(f"the demo model is not to be had: {error}")


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device of a kernel's test: the GPU, or Triton's interpreter without one."""
    if request.param == "cuda":
        return torch.device("cuda")
    if torch.cuda.is_available():
        pytest.skip("with a GPU, Triton compiles and its interpreter is off")
    return torch.device("cpu")


@pytest.fixture
def ops(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The public ops, on Triton."""
    monkeypatch.setenv("QWENKERN_KERNELS", "triton")
    return kernels


@pytest.fixture
def compiling() -> dict[str, str]:
    """The environment of a program that compiles kernels."""
    return {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "QWENKERN_KERNELS")}
