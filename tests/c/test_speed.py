"""The speed of the C ops relative to torch, in one process and alternately. The ratio does not depend on the machine's
speed.

The bounds are far from the measured ratios (docs/performance.md), so that noise does not fail a test."""

from __future__ import annotations

import statistics
import time

import pytest
import torch

from qwenkern import Config
from qwenkern.cache import BlockTable, PagedCache
from qwenkern.engine import Runner
from qwenkern.kernels import c as c_backend
from qwenkern.kernels import decode_attention
from qwenkern.qwen2 import Qwen2, initialise

# the 0.5B size, with fewer layers and words: 118 MB of weights, more than a core's caches
CONFIG = Config(
    vocab_size=32000,
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=2,
    num_attention_heads=14,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=16384,
)
pytestmark = [pytest.mark.xdist_group("speed"), pytest.mark.processor]


@pytest.fixture
def in_c(monkeypatch):
    monkeypatch.delenv("QWENKERN_KERNELS", raising=False)
    monkeypatch.setattr("qwenkern.kernels.triton.backend.INTERPRETED", False)
    if c_backend.prepare():
        pytest.skip("no C compiler here, so torch runs both sides")


@pytest.fixture
def model():
    made = Qwen2(CONFIG, torch.bfloat16, torch.device("cpu"))
    initialise(made, 0)
    return made


def test_a_decode_step_is_faster_than_torchs(in_c, monkeypatch, model):
    cache = PagedCache(CONFIG, 512, torch.bfloat16, torch.device("cpu"))
    table = BlockTable()
    runner = Runner(model, cache)
    runner.logits([(table, list(range(200)))])

    def step(captured):
        table.length = 200
        runner.logits([(table, [7])], [0], captured)

    assert _ratio(monkeypatch, ours=lambda: step(True), torchs=lambda: step(False)) > 1.25


def test_prefill_is_not_slower_than_torchs(in_c, monkeypatch, model):
    if not c_backend.prepared().multiplies:
        pytest.skip("without products of bfloat16 in the vector unit, many tokens run on torch anyway")
    cache = PagedCache(CONFIG, 512, torch.bfloat16, torch.device("cpu"))

    def prefill():
        Runner(model, cache).logits([(table := BlockTable(), list(range(256)))], [255])
        cache.release(table)

    assert _ratio(monkeypatch, ours=prefill, torchs=prefill, rounds=5) > 0.9


def test_attention_over_a_long_cache_does_not_copy_it(in_c, monkeypatch):
    """8,192 cached tokens: the reference gathers them into a tensor first."""
    k_pages, v_pages = (torch.randn(128, 64, 2, 64).bfloat16() for _ in range(2))
    tables, lengths = torch.randperm(128, dtype=torch.int32)[None], torch.tensor([8192], dtype=torch.int32)
    q = torch.randn(1, 14, 64).bfloat16()

    def attend():
        decode_attention(q, (k_pages, v_pages), tables, lengths, 0.125)

    assert _ratio(monkeypatch, ours=attend, torchs=attend) > 1.25


def _ratio(monkeypatch, ours, torchs, rounds=9):
    """The speed-up over torch: the median over rounds with one reading of each, so that other programs affect both."""

    def seconds(function, kernels):
        monkeypatch.setenv("QWENKERN_KERNELS", kernels)
        started = time.perf_counter()
        function()
        return time.perf_counter() - started

    seconds(ours, "triton"), seconds(torchs, "reference")
    ratios = [seconds(torchs, "reference") / seconds(ours, "triton") for _ in range(rounds)]
    print(f"torch's over ours: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    return statistics.median(ratios)
