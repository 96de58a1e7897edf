"""The times within a decode step: the time of each kernel, and the program on a CPU."""

from __future__ import annotations

import json
from importlib import import_module

import pytest
import torch
from typer.testing import CliRunner

from qwenkern import Config
from qwenkern.benchmarks.models import where
from qwenkern.benchmarks.models.where import BETWEEN, CPU_LINEARS, GPU_LINEARS, Span, charge, labels
from qwenkern.cli.commands import app
from qwenkern.kernels import c as c_backend

# the modules, whose names the package gives to their ops
qkv_rope, decode_attention, combine_splits, linear, lm_head = (
    import_module(f"qwenkern.kernels.triton.{name}")
    for name in ("qkv_rope", "decode_attention", "combine_splits", "linear", "lm_head")
)
SMALL = Config(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=256,
)


def test_kernels_that_overlap_are_charged_once():
    """The second one starts early and waits for the first; the third leaves a gap."""
    one = [Span("_linear_kernel", 0.0, 4.0), Span("_combine_kernel", 1.0, 6.0), Span("elementwise", 7.0, 8.0)]
    two = [Span(span.name, span.start + 100, span.end + 100) for span in one]
    found = charge(two + one, steps=2, layers=1)
    assert found == {"o_proj": [4.0], "combine": [2.0], where.OTHER: [1.0], BETWEEN: [1.0]}
    assert sum(sum(each) for each in found.values()) == 8.0


def test_the_median_of_the_steps_counts():
    spans = [Span("_lm_head_kernel", 10.0 * step, 10.0 * step + took) for step, took in enumerate([1.0, 9.0, 2.0])]
    assert charge(spans, steps=3, layers=1)["lm_head"] == [2.0]


def test_steps_that_are_not_alike_are_refused():
    kernels = [Span(name, float(at), at + 1.0) for at, name in enumerate("abcdefgha")]
    with pytest.raises(RuntimeError, match="the profiler saw 9 kernels, which are not 4 equal steps"):
        charge(kernels, steps=4, layers=1)


@pytest.mark.parametrize("lost", [[0], [5, 6], [27], [0, 1, 2, 3], [12, 27]])
def test_a_step_of_which_the_profiler_lost_kernels_does_not_count(lost):
    """Each of 7 steps has 4 kernels, of which the last takes as long as its step's number."""
    names = ["_decode_attention_kernel", "elementwise", "elementwise", "_lm_head_kernel"]
    spans = [
        Span(name, 100.0 * step + 10 * at, 100.0 * step + 10 * at + (step if at == 3 else 1.0))
        for step in range(7)
        for at, name in enumerate(names)
    ]
    kept = [span for at, span in enumerate(spans) if at not in lost]
    found = charge(kept, steps=7, layers=1)
    assert {name: len(each) for name, each in found.items()} == {
        "decode_attention": 1, where.OTHER: 2, "lm_head": 1, BETWEEN: 1,
    }  # fmt: skip
    assert found["decode_attention"] == [1.0]
    assert 2.0 <= found["lm_head"][0] <= 4.0  # about the middle one of those that are whole


def test_every_kernel_of_a_step_has_a_name():
    modules = (qkv_rope, decode_attention, combine_splits, linear, lm_head)
    kernels = {name for module in modules for name in vars(module) if name.endswith("_kernel") and name[0] == "_"}
    assert "_top_k_kernel" in kernels
    assert where.OTHER not in set(labels(kernels, GPU_LINEARS, 1))


def test_a_linears_place_says_which_it_is():
    layer = ["_norm_qkv_rope_kernel", "_decode_attention_kernel", "_combine_kernel", *["_linear_kernel"] * 3]
    names = ["qkv_rope", "decode_attention", "combine", "o_proj", "gate_up", "down"]
    last = ["_lm_head_kernel", "_top_k_kernel"]
    assert list(labels([*layer * 2, *last], GPU_LINEARS, 2)) == [*names * 2, "lm_head", "top_k"]
    recorded = ["linear", "rope_and_cache", "decode_attention", *["linear"] * 3]
    names = ["qkv", "rope_and_cache", "decode_attention", "o_proj", "gate_up", "down"]
    assert list(labels(["embedding", *recorded, "linear"], CPU_LINEARS, 1)) == ["embedding", *names, "lm_head"]


@pytest.fixture
def in_c(monkeypatch):
    monkeypatch.delenv("QWENKERN_KERNELS", raising=False)
    monkeypatch.setattr("qwenkern.kernels.triton.backend.INTERPRETED", False)
    if c_backend.prepare():
        pytest.skip("no C compiler here")


def test_the_parts_of_a_step_on_a_cpu(in_c):
    parts = {part.name: part for part in where.where(SMALL, 2, 100, torch.device("cpu"))}
    assert {name: part.launches for name, part in parts.items()} == {
        "embedding": 1,
        **dict.fromkeys(["qkv", "rope_and_cache", "decode_attention", "o_proj", "gate_up", "down"], 2),
        "lm_head": 1,
        BETWEEN: 1,
    }
    assert all(part.seconds > 0 for name, part in parts.items() if name != BETWEEN)
    assert all(part.floor > 0 for name, part in parts.items() if name != BETWEEN)


def test_the_tables_are_kept(in_c, monkeypatch, tmp_path):
    monkeypatch.setattr(where.Config, "from_name", lambda name: SMALL)
    where.show("small", [1, 2], [100], torch.device("cpu"), tmp_path / "where.json")
    kept = json.loads((tmp_path / "where.json").read_text())
    assert {"device", "torch", "commit", "date", "ceilings"} <= set(kept)
    assert [row["sequences"] for row in kept["rows"] if row["name"] == "lm_head"] == [1, 2]
    assert all(row["seconds"] > 0 for row in kept["rows"] if row["name"] != BETWEEN)


def test_what_torch_runs_cannot_be_taken_apart(monkeypatch):
    monkeypatch.setenv("QWENKERN_KERNELS", "reference")
    with pytest.raises(RuntimeError, match="--where on a CPU needs the step in C"):
        where.where(SMALL, 1, 100, torch.device("cpu"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--tokens", "17"], "expected 1 to 16"), (["--context", "99999"], "expected at most")],
)
def test_bad_arguments(in_c, arguments, message):
    done = CliRunner().invoke(app, ["bench", "--where", "--device", "cpu", "--model", "qwen2.5-0.5b", *arguments])
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())
