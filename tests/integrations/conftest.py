"""Fixtures for the tests of patched models: which backend runs, and that it runs for tensors of any size."""

from __future__ import annotations

import pytest

from qwenkern.integrations.transformers import layers


@pytest.fixture
def ours_at_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our ops run also where a tensor is so small that a patched model on a CPU would keep torch's operations."""
    monkeypatch.setattr(layers, "FEW", 0)


@pytest.fixture(params=["reference", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """On the torch reference, and through the kernels in Triton's interpreter."""
    monkeypatch.setenv("QWENKERN_KERNELS", request.param)
    monkeypatch.setattr(layers, "INTERPRETED", request.param == "triton")
    return request.param
