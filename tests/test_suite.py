"""How the suite itself is run: what a quick run has, and who runs what belongs together."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.selection import FEW, quick

TESTS = Path(__file__).parent


def test_a_quick_run_has_tests_of_every_room(request: pytest.FixtureRequest) -> None:
    """Of every room that is collected, and of every test in it that is not slow, some cases, but not many."""
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
