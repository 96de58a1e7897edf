"""Runs every part of on_gpu.py on a CPU."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qwenkern.benchmarks import on_gpu
from qwenkern.benchmarks.ops.cases import CASES
from qwenkern.benchmarks.ops.providers import PROVIDERS
from qwenkern.cli import commands as cli
from qwenkern.kernels import c as c_backend

PARTS = ("correctness", "end_to_end", "where", "kernels", "compiled", "peers", "sanitizer", "tune")


@pytest.mark.slow
def test_a_dry_run_goes_through_every_part(compiling, tmp_path):
    if not c_backend.library():
        pytest.skip("no C compiler here, which taking a step apart on a CPU needs")
    command = [sys.executable, str(Path(on_gpu.__file__)), "--out", str(tmp_path), "--dry-run", "--tune", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env=compiling, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [(part["part"], part["outcome"]) for part in summary["parts"]] == [(name, "passed") for name in PARTS]
    assert {"device", "torch", "triton", "date", "ceilings"} <= set(summary["facts"])
    files = {file.name for file in tmp_path.iterdir()}
    assert files == {
        "summary.json",
        "on_gpu.log",
        "end_to_end.json",
        "where.json",
        "kernels.json",
        "end_to_end_compiled.json",
        "kernels_peers.json",
        "tuned.tar.gz",
    }
    assert len(files) <= 8, "no more come back from a lent machine"
    log = (tmp_path / "on_gpu.log").read_text()
    assert [line[3:] for line in log.splitlines() if line.startswith("== ")] == list(PARTS)


def test_all_parts_fit_into_one_call(tmp_path):
    assert sum(part.seconds for part in on_gpu.parts(tmp_path, dry=False, tune=0)) <= 500


def test_a_decode_steps_kernels_come_first_and_the_slow_to_start_last(tmp_path):
    commands = {part.name: part.command for part in on_gpu.parts(tmp_path, dry=False, tune=0)}

    def option(part, name):
        return commands[part][commands[part].index(name) + 1].split(",")

    step = ["qkv_rope", "decode_attention", "o_proj", "gate_up", "down", "lm_head", "lm_head_top_k"]
    for part in ("kernels", "peers"):
        cases = option(part, "--op")
        assert cases[: len(step)] == step
        assert sorted(cases) == sorted(case.name for case in CASES)
    assert list(commands)[-2:] == ["peers", "sanitizer"]
    quick, slow = option("kernels", "--provider"), option("peers", "--provider")
    assert {"compile", "flex", "transformers", "liger"} <= set(slow)
    assert slow[0] == "qwenkern", "the one that ratios are over"
    assert {*quick, *slow} == {provider.name for provider in PROVIDERS}


def test_a_part_that_fails_or_hangs_is_reported(tmp_path):
    fails = on_gpu.Part("fails", [sys.executable, "-c", "print('why'); raise SystemExit(3)"], 60)
    hangs = on_gpu.Part("hangs", [sys.executable, "-c", "import time; time.sleep(60)"], 1)
    assert on_gpu.run(fails, tmp_path, {})["outcome"] == "failed with 3"
    assert on_gpu.run(hangs, tmp_path, {})["outcome"] == "ended after 1 s"
    assert (tmp_path / "on_gpu.log").read_text() == "== fails\nwhy\n== hangs\n"


def test_the_workers_of_a_part_that_hangs_end_with_it(tmp_path):
    os.mkfifo(tmp_path / "alive")
    reader = os.open(tmp_path / "alive", os.O_RDONLY | os.O_NONBLOCK)
    started = "import subprocess; subprocess.run('echo >alive; exec sleep 60 >alive', shell=True)"
    for seconds in (2, 20, 60):  # a busy machine may take long to start the worker
        on_gpu.run(on_gpu.Part("hangs", [sys.executable, "-c", started], seconds), tmp_path, {})
        if select.select([reader], [], [], 0)[0]:
            break
    assert select.select([reader], [], [], 10)[0]
    assert os.read(reader, 9) == b"\n", "the worker was there"
    assert select.select([reader], [], [], 10)[0], "it still holds its end"
    assert os.read(reader, 9) == b""
    os.close(reader)


def test_what_a_part_leaves_of_its_time_is_the_next_ones(monkeypatch, tmp_path):
    parts = [on_gpu.Part(name, [], 100) for name in "abc"]
    took, limits = {"a": 30.0, "b": 170.5, "c": 1.0}, []

    def run(part, out, env):
        limits.append(part.seconds)
        return {"part": part.name, "outcome": "passed", "seconds": took[part.name]}

    for name, stand_in in {"run": run, "facts": dict, "parts": lambda *given: parts}.items():
        monkeypatch.setattr(on_gpu, name, stand_in)
    monkeypatch.setattr(sys, "argv", ["on_gpu.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        on_gpu.main()
    assert not ended.value.code
    assert limits == [100, 170, 100]


def test_the_gpu_runs_the_tests_of_every_kernel():
    names = {Path(file).stem for file in on_gpu.kernel_tests()}
    kernels = [
        "decode",
        "decode_attention",
        "linear",
        "lm_head",
        "prefill_attention",
        "qkv_rope",
        "qwen2",
        "rms_norm",
        "rms_norm_backward",
        "rope",
        "swiglu",
        "swiglu_backward",
    ]
    assert {f"test_{name}" for name in kernels} <= names
    assert not names & {"test_gguf", "test_on_gpu", "test_demo"}, "these need packages, or files, that it may not have"


@pytest.mark.parametrize(("command", "words"), [("bench", ["--side-a", "--base", "--plot"]), ("tune", ["--budget"])])
def test_the_command_line_leads_there(command, words):
    done = CliRunner().invoke(cli.app, [command, "--help"])
    assert done.exit_code == 0
    assert all(word in done.output for word in words)
    assert CliRunner().invoke(cli.app, [command, "--op", "rms_nrom"]).exit_code == 2
