"""The programs that measure a whole model, and everything on a GPU in one call: through every part, on a CPU."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import typer
from twins import TINY, tiny_model
from typer.testing import CliRunner

from qwenkern import Config, cli
from qwenkern.benchmarks import end_to_end, on_gpu, peers
from qwenkern.benchmarks.cases import CASES
from qwenkern.benchmarks.providers import PROVIDERS
from qwenkern.kernels import cpu

PARTS = ("correctness", "end_to_end", "where", "kernels", "compiled", "peers", "tune")
app = typer.Typer()
app.command()(end_to_end.main)


def test_a_dry_run_goes_through_every_part(compiling, tmp_path):
    if not cpu.library():
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
    assert list(commands)[-1] == "peers"
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
    on_gpu.run(on_gpu.Part("hangs", [sys.executable, "-c", started], 2), tmp_path, {})
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


def test_a_step_reads_what_the_floor_says():
    """6.17 GB of weights a token for 3B, and 36,864 bytes a cached token."""
    config = Config.from_name("qwen2.5-3b")
    assert end_to_end.step_bytes(config, 1, 0, 2) == pytest.approx(6.17e9, rel=1e-3)
    assert end_to_end.step_bytes(config, 4, 100, 2) - end_to_end.step_bytes(config, 1, 0, 2) == 400 * 36864


def test_a_peer_that_fails_is_reported(monkeypatch):
    def broken(prompts, count):
        raise RuntimeError("out of memory")

    calls = []
    found = end_to_end.measure({"qwenkern": lambda *given: calls.append(given), "peer": broken}, 97, 2, 3, 4, 2)
    assert found["peer"] == {"error": "RuntimeError: out of memory"}
    assert found["qwenkern"]["tokens_per_second"] > 0
    assert [(len(prompts), len(prompts[0]), count) for prompts, count in calls] == [(2, 3, 1), (2, 3, 5)] * 3


def test_llama_cpp_takes_part_where_it_is_installed(monkeypatch, tmp_path):
    """Its package stood in for by what is used of it."""
    asked = []

    class Llama:
        def __init__(self, model_path, n_ctx, n_threads, n_threads_batch, verbose):
            asked.append((model_path, n_ctx))

        def reset(self):
            asked.append("reset")

        def generate(self, tokens, temp, reset):
            asked.append(list(tokens))
            yield from range(100)

    monkeypatch.setitem(sys.modules, "llama_cpp", types.SimpleNamespace(Llama=Llama))
    engine = peers.llama_cpp(tmp_path / "model.gguf", 64)
    engine([[1, 2], [3]], 5)
    assert asked == [(str(tmp_path / "model.gguf"), 64), [1, 2], "reset", [3], "reset"]


def test_the_gguf_file_of_a_model_holds_its_weights(tmp_path):
    gguf = pytest.importorskip("gguf")  # not on every machine with a GPU
    model, config = tiny_model(dtype=torch.bfloat16), TINY
    peers.write_gguf(model, tmp_path / "model.gguf")
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert len(found) == len(peers.unpacked(model))
    gate = torch.from_numpy(found["blk.1.ffn_gate.weight"].data.copy()).view(torch.bfloat16)
    assert torch.equal(gate, model.module.model.layers[1].mlp.gate_up_proj.weight[: config.intermediate_size])
    key = model.module.model.layers[0].self_attn.qkv_proj.bias[config.q_size :][: config.kv_size]
    assert torch.equal(torch.from_numpy(found["blk.0.attn_k.bias"].data.copy()), key.float())


def test_unknown_peers_are_named():
    done = CliRunner().invoke(app, ["--model", "qwen2.5-0.5b", "--layers", "1", "--peers", "vllm"])
    assert done.exit_code == 2
    assert "vllm: not among transformers, patched, liger, compiled, llama.cpp" in " ".join(
        done.output.replace("│", " ").split()
    )


def test_end_to_end_of_random_weights(tmp_path):
    arguments = ["--model", "qwen2.5-0.5b", "--layers", "1", "--prompt-tokens", "8", "--new-tokens", "2"]
    arguments += ["--peers", "transformers"]
    done = CliRunner().invoke(app, [*arguments, "--repeats", "1", "--json", str(tmp_path / "now.json")])
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "now.json").read_text())["rows"]
    assert [row["engine"] for row in rows] == ["qwenkern", "transformers"]
    assert all(row["tokens_per_second"] > 0 and len(row["ours_faster"]) == 3 for row in rows)


@pytest.mark.parametrize(("command", "words"), [("bench", ["--side-a", "--base", "--plot"]), ("tune", ["--budget"])])
def test_the_command_line_leads_there(command, words):
    done = CliRunner().invoke(cli.app, [command, "--help"])
    assert done.exit_code == 0
    assert all(word in done.output for word in words)
    assert CliRunner().invoke(cli.app, [command, "--op", "rms_nrom"]).exit_code == 2
