"""The program that times the host, without a GPU: it compiles kernels, and launches do nothing."""

from __future__ import annotations

import json
import subprocess
import sys

PROGRAM = """
import torch
from triton.runtime.jit import JITFunction
from qwenkern import Config
from qwenkern.benchmarks import host

host.CALLS, host.READINGS = 3, 1
host.CASES = [case for case in host.CASES if case.name in ("add_rms_norm", "rope_and_cache", "qkv")]
bound, bind = [], JITFunction.run
JITFunction.run = lambda self, *args, **given: (bound.append(self), bind(self, *args, **given))[1]
rows = host.ops(Config(96, 64, 96, 1, 4, 2, 32, max_position_embeddings=128), [1, 32], torch.device("meta"), 64)
print([(row.case, row.tokens) for row in rows], all(row.bound > 0 < row.remembered for row in rows))
print(len(bound))
"""


def test_each_launch_is_bound_or_planned(compiling, tmp_path):
    """Three ops at two sizes, one of which runs torch's product at the second: five rows. A call is bound once in the
    beginning, and four times with nothing remembered; then all launches have plans. The kernel of rope_and_cache is not
    told how many tokens there are, so the second size has the plan of the first."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=compiling, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    rows, number = done.stdout.splitlines()
    expected = [("add_rms_norm", 1), ("add_rms_norm", 32), ("qkv", 1), ("rope_and_cache", 1), ("rope_and_cache", 32)]
    assert rows == f"{expected} True"
    assert int(number) == 5 * (1 + 4) - 1


def test_the_results_are_written(compiling, tmp_path):
    file = tmp_path / "host.json"
    command = [sys.executable, "-m", "qwenkern.benchmarks.host", "--model", "qwen2.5-0.5b", "--tokens", "1"]
    done = subprocess.run(
        [*command, "--json", str(file)], capture_output=True, text=True, env=compiling, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert {"add_rms_norm", "qkv_rope", "decode_attention"} <= {row["case"] for row in found["rows"]}
    assert not found["on_gpu"]
    refused = subprocess.run([*command, "--prompts", "128"], capture_output=True, text=True, env=compiling, check=False)
    assert refused.returncode == 2
    assert "there is no GPU here" in refused.stderr
