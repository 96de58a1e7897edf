"""The predicted decode step: what is counted for a kernel, which kernels fit beside each other, and the times."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from ptx.compiling import compiling_process
from typer.testing import CliRunner

from qwenkern import Config
from qwenkern.benchmarks import compile_report, tables
from qwenkern.benchmarks import plan as program
from qwenkern.benchmarks.offline import neighbours, plan
from qwenkern.benchmarks.offline.machine_code import Code
from qwenkern.benchmarks.ops.cases import CASES, Size
from qwenkern.cli.terminal import command

CONFIG = Config.from_name("qwen2.5-3b")
CASE = {case.name: case for case in CASES}
CODE = Code(registers=64, stack=0, spills=0, shared=69 * 1024 - 1024, warps=4)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 16])
def test_what_every_program_reads_again_is_counted(tokens):
    """o_proj reads its weight once, and each of 128 programs reads all tokens, and 16 columns of the stream, which its
    warps load each for itself (2 % more)."""
    with compiling_process() as process:
        (row,) = process.submit(compile_report.examine, "qwen2.5-3b", "o_proj", tokens, "sm_90").result()
    weight, programs = 2048 * 2048 * 2, 2048 // 16
    assert row.grid[0] == programs
    assert row.loaded == pytest.approx(weight + programs * tokens * (2048 + 16) * 2, rel=0.03)
    assert 0 < row.early <= row.loaded
    assert 30 < row.prologue < 1000


@pytest.mark.parametrize(("loaded", "said"), [(12e6, []), (18e6, ["loads take 3.7 us through L2, 2.8 us from memory"])])
def test_more_through_the_l2_cache_than_from_memory_is_a_broken_rule(monkeypatch, loaded, said):
    monkeypatch.setattr(compile_report, "traffic", lambda *given: [SimpleNamespace(loaded=loaded, early=0, prologue=7)])
    row = compile_report.Row("qwen2.5-3b", "o_proj", 16, "sm_90", "_linear_kernel", (128,), CODE, 3, [])
    compile_report.count_traffic([row], CASE["o_proj"], CONFIG, Size(16), ())
    assert (row.loaded, row.early, row.prologue) == (loaded, 0, 7)
    assert row.broken == said


def kernel(case, programs=132, early=None, **code):
    return SimpleNamespace(
        case=case, kernel=f"_{case}_kernel", grid=(programs,), code=replace(CODE, **code), early=early, broken=[]
    )


@pytest.mark.parametrize(
    ("before", "after", "room"),
    [
        (kernel("a"), kernel("b"), 2),  # 228 KiB, 69 of them taken, 69 for each
        (kernel("a", 264), kernel("b"), 1),
        (kernel("a", 1000), kernel("b"), 0),  # three fit, and fill it
        (kernel("a", 1), kernel("b", shared=159 * 1024), 0),  # 159 KiB are left, and it takes one more
        (kernel("a", 1), kernel("b", shared=158 * 1024), 1),
        (kernel("a", shared=0, registers=128), kernel("b", shared=0, registers=128), 3),  # 16,384 registers each
        (kernel("a", shared=0, warps=32, registers=16), kernel("b", shared=0, warps=8, registers=16), 4),  # 64 warps
        (kernel("a", shared=0, warps=1), kernel("b", shared=0, warps=1, registers=16), 31),  # 32 programs
    ],
)
def test_what_fits_beside_the_kernel_before(before, after, room):
    assert neighbours.room("sm_90", before, after) == room


@pytest.mark.parametrize(("early", "beside", "wrong"), [(0, 0, True), (5, 0, False), (0, 69, False), (None, 0, False)])
def test_a_kernel_that_could_overlap_and_does_not_is_wrong(early, beside, wrong):
    before = kernel("a", 132, shared=(227 - beside) * 1024)
    said = neighbours.overlaps_nothing("sm_90", before, kernel("b", early=early))
    assert said == (
        "no program fits beside those of _a_kernel, and none requests a byte before it waits" if wrong else None
    )


def test_a_layer_follows_a_layer_and_the_head_comes_last():
    kernels = [kernel(name) for name in ("qkv", "attention", "attention", "down", "head", "head")]
    found = neighbours.pairs(kernels, "head")
    at = {id(each): number for number, each in enumerate(kernels)}
    assert [(at[id(one)], at[id(other)]) for one, other in found] == [(0, 1), (1, 2), (2, 3), (3, 0), (3, 4), (4, 5)]


def test_the_report_judges_neighbours(monkeypatch):
    """Of the kernels of a layer; nothing that is like a kernel of another model."""
    rows = [
        compile_report.Row("qwen2.5-3b", name, 1, "sm_90", f"_{name}_kernel", (132,), CODE, 1, [], 1, 1)
        for name in reversed(plan.STEP)
    ]
    wide, quiet = (next(row for row in rows if row.case == name) for name in ("o_proj", "gate_up"))
    wide.code, quiet.early = replace(CODE, shared=226 * 1024), 0
    table = compile_report.judge_neighbours(rows, 1)
    assert [row.case for row in rows if row.broken] == ["gate_up"]
    assert list(table.columns[3].cells) == ["2", "0", "0", "2", "2", "2"]
    assert not compile_report.judge_neighbours(rows, 16).rows


def row(loaded, early, kernel="_linear_kernel"):
    return {"kernel": kernel, "loaded": loaded, "early": early, "prologue": 0, "grid": [132], "occupancy": 1}


def test_the_longer_of_two_times_counts_and_latency_hides_early_bytes():
    size = Size(16)
    moved = CASE["o_proj"].bytes_moved(CONFIG, size)
    latency = plan.NODE + 2 * plan.TRIP

    def seconds(*rows):
        return plan.part("o_proj", 1, list(rows), CASE["o_proj"], CONFIG, size).seconds

    assert seconds(row(moved, 0)) == pytest.approx(latency + moved / plan.READ)
    assert seconds(row(4 * moved, 0)) == pytest.approx(latency + 4 * moved / plan.L2)
    hidden = int(latency * plan.READ / 2)
    assert seconds(row(moved, hidden)) == pytest.approx(latency + (moved - hidden) / plan.READ)
    assert seconds(row(moved, moved)) == pytest.approx(max(latency, moved / plan.READ))
    assert seconds(row(moved, 0), row(0, 0)) == pytest.approx(2 * latency + moved / plan.READ)
    busy = row(moved, 0) | {"prologue": 1000}
    assert seconds(busy) == pytest.approx(latency + 1000 * plan.ISSUE + moved / plan.READ)
    assert seconds(busy | {"grid": [132, 3]}) == pytest.approx(
        plan.NODE + 3 * (latency - plan.NODE + 1000 * plan.ISSUE) + moved / plan.READ
    )


def test_instructions_follow_the_latency_while_bytes_arrive():
    size = Size(1, weights="int4")
    moved, latency = CASE["down"].bytes_moved(CONFIG, size), plan.NODE + 2 * plan.TRIP

    def seconds(issue, early, **rate):
        kernel = row(moved, early) | {"issue_seconds": issue}
        return plan.part("down", 1, [kernel], CASE["down"], CONFIG, size, **rate).seconds

    assert seconds(1e-6, 0) == pytest.approx(latency + moved / plan.READ)  # 3.9 us
    assert seconds(1e-6, moved) == pytest.approx(moved / plan.READ)
    assert seconds(5e-6, moved) == pytest.approx(latency + 5e-6)
    assert seconds(5e-6, moved, rate=0.5) == pytest.approx(latency + 10e-6)


def test_a_quantised_step_has_its_formats():
    dense, parts = (plan.step(CONFIG, 1, 1024, plan.load(), quantize) for quantize in ("dense", "int4"))
    found = {part.op: part.bytes for part in parts}
    assert found["gate_up"] == pytest.approx(36 * 22016 * 2048 * (4 + 24 / 128) / 8, rel=0.005)
    assert found["lm_head_top_k"] == pytest.approx(151936 * 2048 * (8 + 24 / 128) / 8, rel=0.005)
    assert found["decode_attention"] == dense[1].bytes
    assert sum(part.seconds for part in parts) < sum(part.seconds for part in dense)
    with pytest.raises(ValueError, match="no qkv_rope of 1 tokens with weights in q4_1"):
        plan.step(CONFIG, 1, 1024, plan.load(), "q4_1")


def test_the_plan_of_quantised_weights_prints():
    done = CliRunner().invoke(command(program.main), ["--quantize", "int4"])
    assert done.exit_code == 0, done.output
    assert "| int4, 1 sequence of 1,024 tokens |" in done.output
    assert "q4_k" not in done.output
    assert CliRunner().invoke(command(program.main), ["--quantize", "int3"]).exit_code == 2


def test_the_constants_are_those_that_were_measured():
    """On kernels that show one of them each: reading alone, loads through L2 alone, and latency alone. lm_head of 16
    tokens had 4,748 programs, each of which read 405,504 bytes."""
    file = tables.RESULTS / "nvidia-h100-80gb-hbm3" / "where_untuned.json"
    took = {
        (each["name"], each["sequences"], each["context"]): each["seconds"] / each["launches"]
        for each in json.loads(file.read_text(encoding="utf-8"))["rows"]
    }
    reading = CASE["lm_head"].bytes_moved(CONFIG, Size(1)) / took["lm_head", 1, 1024]
    assert pytest.approx(reading, rel=0.05) == plan.READ
    assert pytest.approx(4748 * 405504 / took["lm_head", 16, 1024], rel=0.05) == plan.L2
    combine = {"grid": [2, 16, 1], "occupancy": 16, "prologue": 209}
    assert pytest.approx(took["combine", 1, 1024], rel=0.1) == plan.latency(combine)
    assert pytest.approx(took["torch's own kernels", 1, 1024], rel=0.1) == plan.TORCH_NODE


def test_a_step_is_the_sum_of_its_parts():
    parts = plan.step(CONFIG, 1, 1024, plan.load())
    assert [part.op for part in parts] == [*plan.STEP, "torch's kernels"]
    assert plan.tokens_per_second(parts, 1) == pytest.approx(1 / sum(part.seconds for part in parts))
    assert plan.tokens_per_second(parts, 1) < plan.on_paper(parts, 1)
    longer = plan.step(CONFIG, 1, 32768, plan.load())
    assert longer[1].bytes > 30 * parts[1].bytes
    assert [part.seconds for part in longer[2:]] == [part.seconds for part in parts[2:]]
