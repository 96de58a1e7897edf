"""The registry's cases on a CPU, for regressions: `pytest -n 0 tests/test_speed.py --benchmark-autosave`, and later
`--benchmark-compare --benchmark-compare-fail=median:20%`. In the suite each runs once, and no time fails it."""

from __future__ import annotations

import pytest
import torch

from qwenkern import Config
from qwenkern.benchmarks.cases import CASES, Size

CONFIG = Config.from_name("qwen2.5-0.5b")
FEW = [case for case in CASES if not case.name.startswith("lm_head")]


@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
def test_speed(benchmark, case):
    inputs = case.inputs(CONFIG, Size(1, context=256, device="cpu"))
    out = benchmark(case.run, *inputs)
    first = out[0] if isinstance(out, tuple) else out
    assert torch.isfinite(first).all()
