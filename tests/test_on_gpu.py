"""The programs that measure a whole model, and everything on a GPU in one call: through every part, on a CPU."""

from __future__ import annotations

import json
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

PARTS = ("correctness", "end_to_end", "kernels", "compiled", "tune")
app = typer.Typer()
app.command()(end_to_end.main)


def test_a_dry_run_goes_through_every_part(compiling, tmp_path):
    command = [sys.executable, str(Path(on_gpu.__file__)), "--out", str(tmp_path), "--dry-run", "--tune", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env=compiling, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [(part["part"], part["outcome"]) for part in summary["parts"]] == [(name, "passed") for name in PARTS]
    assert {"device", "torch", "triton", "date", "ceilings"} <= set(summary["facts"])
    files = {file.name for file in tmp_path.iterdir()}
    assert files == {
        "summary.json",
        "kernels.json",
        "end_to_end.json",
        "end_to_end_compiled.json",
        "tuned.tar.gz",
        *(f"{name}.log" for name in PARTS),
    }


def test_a_part_that_fails_or_hangs_is_reported(tmp_path):
    fails = on_gpu.Part("fails", [sys.executable, "-c", "print('why'); raise SystemExit(3)"], 60)
    hangs = on_gpu.Part("hangs", [sys.executable, "-c", "import time; time.sleep(60)"], 1)
    assert on_gpu.run(fails, tmp_path, {})["outcome"] == "failed with 3"
    assert (tmp_path / "fails.log").read_text() == "why\n"
    assert on_gpu.run(hangs, tmp_path, {})["outcome"] == "ended after 1 s"


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
