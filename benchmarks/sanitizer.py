"""Runs a few GPU tests under NVIDIA's compute-sanitizer: its memory, race and barrier checks.

    python benchmarks/sanitizer.py

If the tool is not installed, one line says so, and the exit code is 0. racecheck checks only shared memory; the PTX
runner and the repeated tests look for races in global memory.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHECKS = ("memcheck", "racecheck", "synccheck")
FAILED = 97  # the exit code if the tool finds an error
# One case of each kernel: under the tool a kernel takes 10 to 100 times as long.
TESTS = {
    "test_linear.py": "test_programs_share_a_tile",
    "test_decode_attention.py": "test_several_tiles_a_split and bfloat16",
    "test_prefill_attention.py": "test_ragged_batch",
    "test_qkv_rope.py": "test_v_is_not_rotated",
    "test_lm_head.py": "test_top_k and 403",
}


def find() -> str | None:
    """The program: on the path, or in a CUDA toolkit's folder."""
    roots = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda", *map(str, Path("/usr/local").glob("cuda-*"))]
    folders = [
        os.environ.get("PATH", ""),
        *(f"{root}/bin{os.pathsep}{root}/compute-sanitizer" for root in roots if root),
    ]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def command(tool: str, check: str) -> list[str]:
    tests = [str(ROOT / "tests" / "kernels" / file) for file in TESTS]
    chosen = " or ".join(f"({words})" for words in TESTS.values())
    pytest = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "gpu", "-k", chosen, *tests]
    pytest += ["-p", "no:xdist"] if importlib.util.find_spec("xdist") else []
    return [tool, "--tool", check, "--error-exitcode", str(FAILED), "--print-limit", "20", *pytest]


def main() -> int:
    tool = find()
    if tool is None:
        print("left out: compute-sanitizer is not installed (it is a part of the CUDA toolkit)")
        return 0
    # Each tensor is an allocation of its own, so that memcheck sees an access between two tensors.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    found = {}
    for check in CHECKS:
        print(f"== {check}", flush=True)
        found[check] = subprocess.run(command(tool, check), env=environment, cwd="/", check=False).returncode
    print(*(f"{check}: {'clean' if code == 0 else f'exit code {code}'}" for check, code in found.items()), sep="\n")
    return max(found.values())


if __name__ == "__main__":
    sys.exit(main())
