"""Compiled kernels are carried to another machine, which finds them in Triton's cache."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest
from ptx.compiling import compiling_process

from qwenkern.benchmarks import carry, sanitizer
from qwenkern.benchmarks.offline import carried
from qwenkern.benchmarks.offline.carried import KEYS

CASE = "case", "qwen2.5-0.5b", "rms_norm", 1
OTHER = "import triton.runtime.cache as cache\ncache.triton_key = lambda: 'another build of the same version'"


def kernels(folder: Path) -> set[str]:
    return {name for name in os.listdir(folder) if name != KEYS}


@pytest.mark.slow
def test_what_was_carried_is_not_compiled_again(tmp_path):
    """Also where Triton's own files are others, as for another Python, and the name of each folder is another."""
    here, there, file = tmp_path / "here", tmp_path / "there", tmp_path / "kernels.tar.xz"
    with compiling_process() as process:
        assert process.submit(carry.compile_task, "sm_90", str(here), (True, False), CASE).result() == 2
        assert process.submit(carried.pack, here, file).result() == 2
    with compiling_process() as process:
        process.submit(exec, OTHER).result()
        assert process.submit(carried.unpack, file, there).result() == 2
        found = kernels(there)
        assert len(found) == 2
        assert not found & kernels(here)
        process.submit(carry.compile_task, "sm_90", str(there), (True, False), CASE).result()
        assert kernels(there) == found
        process.submit(carry.compile_task, "sm_80", str(there), (False,), CASE).result()
        assert len(kernels(there)) == 3, "a kernel that was not carried is compiled, or this shows nothing"


def test_kernels_of_another_triton_are_refused(tmp_path):
    with tarfile.open(tmp_path / "old.tar.xz", "w:xz") as archive:
        member = tarfile.TarInfo("triton")
        member.size = 5
        archive.addfile(member, io.BytesIO(b"2.0.0"))
    with pytest.raises(ValueError, match=r"old\.tar\.xz has kernels of Triton 2\.0\.0; expected 3"):
        carried.unpack(tmp_path / "old.tar.xz", tmp_path)


@pytest.mark.slow
def test_what_tests_launch_is_compiled(monkeypatch, tmp_path):
    """On a CPU, by a plugin under which they compare nothing; 3 numbers of columns, 2 of rows, 3 dtypes."""
    test = Path(__file__).parents[1] / "kernels" / "test_swiglu.py"
    monkeypatch.setattr(carry, "kernel_tests", lambda: [f"{test}::test_swiglu"])
    said = carry.compile_tests("sm_80", str(tmp_path), 1)
    assert "passed" in said
    assert "failed" not in said
    assert len(kernels(tmp_path)) > 3


@pytest.mark.slow
def test_a_whole_model_is_compiled(tmp_path):
    """Its decode steps and its passes over prompts, on tensors without memory."""
    with compiling_process() as process:
        process.submit(carry.compile_task, "sm_80", str(tmp_path), (False,), ("model", "qwen2.5-0.5b")).result()
    names = {file.stem for file in tmp_path.rglob("*.cubin")}
    assert {
        "_norm_qkv_rope_kernel",
        "_decode_attention_kernel",
        "_prefill_attention_kernel",
        "_lm_head_kernel",
    } <= names


def test_the_sanitizer_is_left_out_where_it_is_not_installed(monkeypatch, capsys):
    monkeypatch.setattr(sanitizer, "find", lambda: None)
    assert sanitizer.main() == 0
    assert capsys.readouterr().out.startswith("left out: compute-sanitizer is not installed")


def test_the_sanitizer_makes_each_check(monkeypatch, tmp_path, capfd):
    """What it finds is the exit code."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\necho "asked for $2"\n[ "$2" != racecheck ] || exit 97\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert sanitizer.find() == str(tool)
    assert sanitizer.main() == 97
    said = capfd.readouterr().out
    assert [line for line in said.splitlines() if line.startswith("asked")] == [
        f"asked for {check}" for check in ("memcheck", "racecheck", "synccheck")
    ]
    assert "racecheck: exit code 97" in said
