"""Selects the tests of a quick run."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch

FEW = 2  # cases of a test


def quick(items: Iterable[pytest.Item]) -> set[pytest.Item]:
    """At most FEW cases of each test, at equal distances from the first to the last, without cases that are marked slow
    or cannot run here."""
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        absent = item.get_closest_marker("gpu") and not torch.cuda.is_available()
        if not item.get_closest_marker("slow") and not absent:
            tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    return {cases[at * (len(cases) - 1) // (FEW - 1)] for cases in tests.values() for at in range(FEW)}
