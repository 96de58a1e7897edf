"""The cost of structured output: both kinds of texts have equally many tokens, and the ratio is that of their times."""

from __future__ import annotations

import pytest
from support.servers import toy

from qwenkern.benchmarks import structured


@pytest.fixture
def model():
    with toy() as model:
        yield model


def test_a_row_has_the_times_of_both(model, monkeypatch):
    asked, seconds = [], iter([9.0, 9.0, 1.0, 1.5, 4.0, 2.0])

    def step(model, count, params, new):
        asked.append((count, params.json_schema is not None, new))
        return next(seconds)

    monkeypatch.setattr(structured, "step", step)
    found = structured.row(model, 8, "drawn", 5, rounds=2)
    assert asked == [(8, schema, 5) for schema in (False, True, True, False, False, True)]
    assert found["free_ms"] == [2750, 1500, 4000]
    assert found["schema_ms"] == [1500, 1000, 2000]
    assert found["ratio"] == [(1 / 1.5 + 0.5) / 2, 0.5, 1 / 1.5]
    assert found["case"] == "drawn, with speculation"


@pytest.mark.parametrize("how", structured.HOW)
def test_a_step_is_a_part_of_a_call(model, how):
    assert structured.step(model, 2, structured.HOW[how], 3) > 0
