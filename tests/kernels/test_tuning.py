"""Tuned configurations: how they are looked up, and how the tuner finds and writes them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer
from support.references import assert_matches_reference, random
from test_dequantise import random_bits
from typer.testing import CliRunner

from qwenkern import Config
from qwenkern.benchmarks import tune
from qwenkern.benchmarks.models import step_tuning
from qwenkern.benchmarks.ops.cases import CASES, Size
from qwenkern.benchmarks.ops.timing import Ceilings
from qwenkern.kernels.triton import tuning

TINY = Config(97, 64, 96, 1, 4, 2, 16, max_position_embeddings=128)
BY_NAME = {case.name: case for case in CASES}
DEVICE = tuning.Device("Some Card (80 GB)", "cuda", 90, 132, 232448)
SIZES = {"rows": 4, "columns": 1000}
app = typer.Typer()
app.command()(tune.main)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, Triton's interpreter is off")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("QWENKERN_CONFIG_DIR", str(tmp_path))
    tuning.forget()
    tuning._warn_once.cache_clear()
    yield tmp_path
    tuning.forget()


def _tuned(folder, text):
    file = folder / "some-card-80-gb" / "swiglu.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(text if isinstance(text, str) else json.dumps({"entries": text}))


def test_the_nearest_entry_is_laid_over_the_heuristic(folder):
    _tuned(
        folder,
        [
            {"sizes": {"rows": 1, "columns": 1000}, "config": {"BLOCK": 1}},
            {"sizes": {"rows": 8, "columns": 900}, "config": {"BLOCK": 2}},
        ],
    )
    heuristic = {"BLOCK": 0, "num_warps": 4}
    assert tuning.lookup("swiglu", DEVICE, SIZES, heuristic) == {"BLOCK": 2, "num_warps": 4}
    assert tuning.lookup("swiglu", DEVICE, SIZES | {"rows": 1}, heuristic)["BLOCK"] == 1
    assert tuning.lookup("linear", DEVICE, SIZES, heuristic) == heuristic


DAMAGED = [
    "{",
    "[]",
    "[" * 100_000,
    '{"entries": 5}',
    '{"entries": [1]}',
    '{"entries": [{"sizes": 1, "config": {}}]}',
    '{"entries": [{"sizes": {"rows": 0, "columns": 1}, "config": {}}]}',
    '{"entries": [{"sizes": {"rows": 1, "columns": 1}, "config": {"BLOCK": "wide"}}]}',
]


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_file_is_named_and_ends_no_forward_pass(folder, text):
    _tuned(folder, text)
    with pytest.raises(ValueError, match=r"swiglu\.json is not a tuned configuration"):
        tuning.read_entries(folder / "some-card-80-gb" / "swiglu.json")
    with pytest.warns(UserWarning, match=r"swiglu\.json is not a tuned configuration.*; the kernel's own choice"):
        assert tuning.lookup("swiglu", DEVICE, SIZES, {"BLOCK": 1}) == {"BLOCK": 1}


def test_an_entry_without_a_size_is_named(folder):
    _tuned(folder, [{"sizes": {"rows": 1}, "config": {"BLOCK": 2}}])
    with pytest.warns(UserWarning, match="swiglu for Some Card .* has no size columns"):
        assert tuning.lookup("swiglu", DEVICE, SIZES, {"BLOCK": 1}) == {"BLOCK": 1}


@pytest.mark.parametrize(("name", "value"), [("BLOCK", 3), ("BLOCK", 1 << 30), ("BLOCK", 0), ("num_warps", 64)])
def test_a_value_that_no_kernel_compiles_with_is_named(folder, ops, name, value):
    _tuned(folder, [{"sizes": SIZES, "config": {name: value}}])
    with pytest.warns(UserWarning, match=f"swiglu for Some Card .* sets {name} to {value}; expected a value like"):
        assert tuning.lookup("swiglu", DEVICE, SIZES, {"BLOCK": 256, "num_warps": 4})["BLOCK"] == 256


def test_a_folder_that_cannot_be_looked_into_is_as_none(folder, monkeypatch):
    for odd in ("/proc/self/mem/x", str(folder / "file" / "in a file"), "~nobody", "x" * 5000):
        (folder / "file").write_text("")
        monkeypatch.setenv("QWENKERN_CONFIG_DIR", odd)
        assert tuning.lookup("swiglu", DEVICE, SIZES, {"BLOCK": 1}) == {"BLOCK": 1}


def test_an_unknown_field_is_named(folder):
    _tuned(folder, [{"sizes": SIZES, "config": {"BLOK": 1}}])
    with pytest.warns(UserWarning, match=r"swiglu for Some Card .* sets BLOK, and the kernel has BLOCK"):
        assert tuning.lookup("swiglu", DEVICE, SIZES, {"BLOCK": 1}) == {"BLOCK": 1}


def test_a_kernel_runs_with_what_was_tuned(folder, ops):
    """From the file to the launch."""
    file = folder / "interpreter" / "swiglu.json"
    tune.write(file, "swiglu", {"device": "interpreter"}, {"rows": 2, "columns": 32}, {"BLOCK": 16, "num_warps": 1})
    with tuning.trying("rms_norm", {}):
        ops.swiglu(torch.ones(2, 64))
    from qwenkern.kernels.triton.swiglu_backward import config

    assert config("swiglu", tuning.INTERPRETER, 2, 32) == {"BLOCK": 16, "num_warps": 1}


def test_what_was_tuned_for_other_pages_stays_within_one(folder):
    from qwenkern.kernels.triton.decode_attention import _config

    sizes = {"num_kv_heads": 2, "head_dim": 64, "page_size": 64}
    tune.write(folder / "interpreter" / "decode_attention.json", "decode_attention", {}, sizes, {"BLOCK_N": 64})
    assert _config(tuning.INTERPRETER, 2, 64, 64, 2)["BLOCK_N"] == 64
    assert _config(tuning.INTERPRETER, 2, 64, 48, 2)["BLOCK_N"] == 16
    assert _config(tuning.INTERPRETER, 2, 64, 64, 4)["BLOCK_N"] == 32  # float32 keeps its own


def test_triton_compiles_where_its_folder_cannot_be_written(compiling):
    """As for a user without a home."""
    code = """
import os, warnings, torch, triton
from triton.runtime.cache import get_cache_manager
from qwenkern.kernels import dispatch
from qwenkern.kernels.triton import tuning
with warnings.catch_warnings(record=True) as said, tuning.offline(tuning.Device("any", "cuda", 90, 132, 232448)):
    warnings.simplefilter("always")
    dispatch.prepare(torch.device("meta"), torch.float32)
    dispatch.prepare(torch.device("meta"), torch.float32)
print(*(each.message for each in said))
print(os.path.isfile(get_cache_manager("0" * 64).put(b"compiled", "kernel.cubin")), triton.knobs.cache.dir)
"""
    environment = compiling | {"TRITON_CACHE_DIR": "/proc/nowhere"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    said, kept = done.stdout.splitlines()
    assert said == "qwenkern: Triton keeps no compiled kernels in /proc/nowhere: No such file or directory"
    assert kept.startswith("True ")
    assert not Path(kept.split()[1]).exists()  # it goes with the process


SPACE = {"BLOCK": (16, 32, 64), "num_warps": (1, 2)}


@pytest.fixture
def problem(ops, monkeypatch):
    monkeypatch.setattr(tune, "ceilings", lambda device: Ceilings(1e12, 1e15))
    (found,) = tune.problems(BY_NAME["swiglu"], TINY, [Size(3, device="cpu")])
    return found


def _search(problem, log, seconds=60.0, space=SPACE):
    return tune.search(problem, space, log, time.monotonic() + seconds)


def test_a_search_tries_the_whole_space(problem, tmp_path):
    _, tried = _search(problem, tmp_path / "log")
    assert sorted((each.config["BLOCK"], each.config["num_warps"]) for each in tried) == [
        (block, warps) for block in (16, 32, 64) for warps in (1, 2)
    ]
    assert all(each.seconds for each in tried)


def test_a_stopped_search_goes_on(problem, tmp_path, monkeypatch):
    log = tmp_path / "log"
    _search(problem, log, space={"BLOCK": (16, 32), "num_warps": (1,)})
    with log.open("a") as stream:
        stream.write('[{"BLOCK": 64, "num_')  # cut off
    attempts = []
    whole = tune._try
    monkeypatch.setattr(tune, "_try", lambda *given: attempts.append(given[1]) or whole(*given))
    _, tried = _search(problem, log)
    assert len(attempts) == 4
    assert len(tried) == 6


def test_no_time_no_search(problem, tmp_path):
    winner, tried = _search(problem, tmp_path / "log", seconds=-1.0)
    assert (winner, tried) == ({}, [])


def test_the_roofline_ends_a_search(problem, tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "ceilings", lambda device: Ceilings(1.0, 1.0))
    assert _search(problem, tmp_path / "log")[1] == []


def test_a_wrong_candidate_cannot_win(problem, tmp_path, monkeypatch):
    """However fast: the kernel is broken wherever BLOCK is 32, and takes no time there."""
    import qwenkern.kernels as kernels

    right = kernels.swiglu

    def sometimes_wrong(gate_up):
        out = right(gate_up)
        return out * 1.1 if tuning._trial and tuning._trial.config.get("BLOCK") == 32 else out

    monkeypatch.setattr(kernels, "swiglu", sometimes_wrong)
    winner, tried = _search(problem, tmp_path / "log")
    wrong = [each for each in tried if each.config["BLOCK"] == 32]
    assert len(wrong) == 2
    assert all(each.seconds is None and "the error is" in each.reason for each in wrong)
    assert winner.get("BLOCK") != 32


def test_a_candidate_that_raises_is_rejected(problem, tmp_path):
    _, tried = _search(problem, tmp_path / "log", space={"BLOCK": (16, 24), "num_warps": (1,)})
    reasons = {each.config["BLOCK"]: each.reason for each in tried}
    assert reasons[16] == ""
    assert "power of 2" in reasons[24] or "Error" in reasons[24]


def test_the_faster_one_wins(problem, tmp_path, monkeypatch):
    monkeypatch.setattr(tune.Problem, "seconds", lambda self, patience=0: 1.0 / tuning._trial.config.get("BLOCK", 16))
    winner, _ = _search(problem, tmp_path / "log")
    assert winner["BLOCK"] == 64


def test_the_heuristic_stays_where_nothing_is_clearly_faster(problem, tmp_path, monkeypatch):
    monkeypatch.setattr(tune.Problem, "seconds", lambda self, patience=0: 1.0)
    assert _search(problem, tmp_path / "log")[0] == {}


def test_numbers_of_tokens_that_share_a_configuration_are_tuned_together(ops):
    sizes = [Size(tokens, context=64, device="cpu") for tokens in (1, 16, 17)]
    (together,) = tune.problems(BY_NAME["o_proj"], TINY, sizes)  # 17 take the library's product
    assert [size.tokens for size in together.sizes] == [1, 16]
    apart = tune.problems(BY_NAME["swiglu"], TINY, sizes)
    assert [[size.tokens for size in each.sizes] for each in apart] == [[1], [16], [17]]


def test_entries_are_replaced_and_taken_away(tmp_path):
    file = tmp_path / "swiglu.json"
    for sizes, winner in ((SIZES, {"BLOCK": 1}), ({"rows": 9}, {"BLOCK": 3}), (SIZES, {"BLOCK": 2})):
        tune.write(file, "swiglu", {}, sizes, winner)
    assert [entry["config"]["BLOCK"] for entry in tuning.read_entries(file)] == [3, 2]
    tune.write(file, "swiglu", {}, SIZES, {})
    assert [entry["sizes"] for entry in tuning.read_entries(file)] == [{"rows": 9}]


def test_every_declared_field_is_the_kernels_own(ops, monkeypatch):
    """A space that names what the kernel does not take would be searched in vain."""
    tuned = {case.name: tune._TUNED_AS.get(case.op, case.op) for case in CASES if case.op != "embedding"}
    assert set(tuned.values()) == set(tuning.SPACES)
    for name, op in tuned.items():
        case = BY_NAME[name]
        with tuning.trying(op, {}) as trial:
            case.run(*case.inputs(TINY, Size(1, context=64, device="cpu")))
        _, heuristic = trial.seen[-1]
        assert set(tuning.SPACES[op]) <= set(heuristic), name


def test_the_command(ops, tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "ceilings", lambda device: Ceilings(1e12, 1e15))
    monkeypatch.setitem(tuning.SPACES, "rms_norm", {"num_warps": (1, 2)})
    arguments = ["--op", "rms_norm", "--tokens", "1", "--model", "qwen2.5-0.5b", "--budget", "30"]
    done = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    stored = json.loads((tmp_path / "interpreter" / "rms_norm.json").read_text())
    assert {"op", "device", "triton", "date", "entries"} == set(stored)


def test_the_command_for_quantised_weights(ops, tmp_path, monkeypatch):
    """Only ops that have weights, each format in a file of its own."""
    monkeypatch.setattr(tune, "ceilings", lambda device: Ceilings(1e12, 1e15))
    monkeypatch.setitem(tuning.SPACES, "linear", {"num_warps": (2, 4), "AHEAD": (0, 64)})
    monkeypatch.setattr(tune, "_candidates", lambda space, heuristic: iter([{"num_warps": 2}]))
    found = []
    monkeypatch.setattr(tune, "_beats_the_heuristic", lambda problem, good: found.append(problem) or {"num_warps": 2})
    arguments = ["--op", "o_proj,rms_norm", "--tokens", "1", "--model", "qwen2.5-0.5b", "--weights", "int4"]
    done = CliRunner().invoke(app, [*arguments, "--budget", "30", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    stored = json.loads((tmp_path / "interpreter" / "linear.int4.json").read_text())
    assert stored["entries"] == [{"sizes": {"n": 896, "k": 896}, "config": {"num_warps": 2}}]
    assert [file.name for file in (tmp_path / "interpreter").glob("*.json")] == ["linear.int4.json"]
    assert [each.op for each in found] == ["linear.int4"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [("int5", (), "expected one of dense"), ("q4_k", ("--step",), "expected one of dense, int8, int4, fp8")],
)
def test_a_format_that_is_not_tuned(name, options, message):
    done = CliRunner().invoke(app, ["--op", "o_proj", "--weights", name, *options])
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())


def test_a_quantised_kernel_runs_with_what_was_tuned_for_its_format(ops, monkeypatch, tmp_path):
    """Fields of the other design and those that would leave a split empty are put right."""
    folder = tmp_path / tuning.INTERPRETER.folder
    folder.mkdir()
    monkeypatch.setenv("QWENKERN_CONFIG_DIR", str(tmp_path))
    entries = {"entries": [{"sizes": {"n": 64, "k": 4096}, "config": {"num_warps": 2, "BLOCK_N": 16, "SPLIT_K": 8}}]}
    (folder / "linear.int4.json").write_text(json.dumps(entries))
    (folder / "linear.json").write_text(json.dumps({"entries": [{"sizes": SIZES, "config": {"num_warps": 1}}]}))
    tuning.forget()
    try:
        for columns, form in ((4096, "int4"), (256, "int4"), (4096, "q8_0")):
            weight = random_bits(form, 64, columns, torch.bfloat16)
            x = random(2, columns, dtype=torch.bfloat16, device=torch.device("cpu"))
            chosen = ops.triton.tiling.tiling("linear", x, weight)[2]
            heuristic = ops.triton.tiling._packed(
                "linear", tuning.INTERPRETER, 64, columns, 2, 2, weight.nbytes // 64, 16, weight.triton_numbers()
            )
            tuned = {"num_warps": 2, "BLOCK_N": 16} if form == "int4" else {}
            assert {name: chosen[name] for name in ("num_warps", "BLOCK_N")} == {
                name: tuned.get(name, heuristic[name]) for name in ("num_warps", "BLOCK_N")
            }
            blocks = -(-columns // chosen["BLOCK_K"])
            each = -(-blocks // chosen["SPLIT_K"])
            assert (chosen["SPLIT_K"] - 1) * each < blocks, "a split is empty"
            if columns == 256:
                assert chosen["SPLIT_K"] == 1
                assert_matches_reference(ops, "linear", x, weight)
    finally:
        tuning.forget()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(tmp_path):
    tmp_path.chmod(0o500)
    done = CliRunner().invoke(app, ["--op", "rms_norm", "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert "cannot be written to" in done.output


def test_a_file_where_the_folder_should_be(ops, tmp_path):
    (tmp_path / "interpreter").write_text("")
    done = CliRunner().invoke(app, ["--op", "rms_norm", "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert "cannot be written to" in " ".join(done.output.replace("│", " ").split())


STEP_SPACES = {"linear": {"BLOCK_K": (128, 256, 512), "num_stages": (2, 3, 4)}, "swiglu": {"BLOCK": (1, 2)}}
STEP_LINEAR = ("linear", (("n", 8), ("k", 16)))
STEP_SWIGLU = ("swiglu", (("rows", 1),))


def _looked_up():
    """The configurations of two kernels of a step."""
    linear = tuning.lookup("linear", DEVICE, {"n": 8, "k": 16}, {"BLOCK_K": 128, "num_stages": 2, "num_warps": 4})
    return linear, tuning.lookup("swiglu", DEVICE, {"rows": 1}, {"BLOCK": 1})


def _step_seconds():
    """Fastest with BLOCK_K 256, 4 stages and BLOCK 1; 512 does not fit."""
    linear, swiglu = _looked_up()
    if linear["BLOCK_K"] == 512:
        raise MemoryError("512 does not fit")
    return 10.0 + (linear["BLOCK_K"] != 256) + abs(linear["num_stages"] - 4) + swiglu["BLOCK"]


def test_a_step_is_searched_kernel_by_kernel(folder):
    with tuning.overriding() as overrides:
        found = step_tuning.search(_step_seconds, overrides, STEP_SPACES, time.monotonic() + 60)
    assert (found.before, found.after) == (14.0, 11.0)
    assert found.configs == {STEP_LINEAR: {"BLOCK_K": 256, "num_stages": 4}}
    assert {each.reason for each in found.tried if each.seconds is None} == {"MemoryError: 512 does not fit"}
    assert _looked_up() == ({"BLOCK_K": 128, "num_stages": 2, "num_warps": 4}, {"BLOCK": 1})  # nothing stays


def test_a_step_search_ends_at_its_deadline(folder):
    with tuning.overriding() as overrides:
        found = step_tuning.search(_step_seconds, overrides, STEP_SPACES, time.monotonic() - 1)
    assert (found.after, found.tried, found.configs) == (14.0, [], {})


def test_a_step_search_begins_with_the_tuned_file(folder):
    _tuned(folder, [{"sizes": {"rows": 1}, "config": {"BLOCK": 2}}])
    with tuning.overriding() as overrides:
        found = step_tuning.search(_step_seconds, overrides, STEP_SPACES, time.monotonic() + 60)
    assert found.before == 15.0
    assert found.configs[STEP_SWIGLU] == {"BLOCK": 1}


def test_a_step_needs_a_gpu(folder, monkeypatch):
    result = CliRunner().invoke(app, ["--step", "--device", "cpu", "--out", str(folder)])
    assert result.exit_code == 2
    assert "a captured step needs a GPU" in result.output
