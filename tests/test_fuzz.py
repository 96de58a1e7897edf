"""Damaged files and odd requests: a few hundred of those that fuzz.py tries."""

from __future__ import annotations

import fuzz
import pytest

INPUTS = 150


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_every_input_ends_in_success_or_in_our_error(name):
    outcomes = list(fuzz.run(name, INPUTS))
    assert len(outcomes) == INPUTS
    assert not [(number, outcome) for number, outcome in outcomes if outcome.startswith("FAULT")]


def test_a_fault_is_told_from_an_error():
    def divides(chance):
        return 1 / 0

    assert "ZeroDivisionError" in fuzz.attempt(divides, "name", 0)
    assert fuzz.attempt(divides, "name", 0).startswith("FAULT")
    assert fuzz.attempt(lambda chance: None, "name", 0) == "success"


def test_a_wait_is_a_fault(monkeypatch):
    monkeypatch.setattr(fuzz, "SECONDS", 0.05)

    def waits(chance):
        while True:
            pass

    assert "TooSlow" in fuzz.attempt(waits, "name", 0)
