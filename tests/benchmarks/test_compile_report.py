"""The compile report: its rules, its reader, and Qwen2.5-3B on every architecture."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from qwenkern.benchmarks import compile_report
from qwenkern.benchmarks.compile_report import broken_rules
from qwenkern.benchmarks.offline.machine_code import DEVICES, Access, Code, Launch, accesses, occupancy
from qwenkern.benchmarks.ops.cases import CASES

PROGRAM = Path(compile_report.__file__)
GOOD = Code(
    registers=64,
    stack=0,
    spills=0,
    shared=65536,
    warps=4,
    accesses=[Access("load", "weight", "linear.py:1", 16384, 128), Access("load", "length", "linear.py:2", 4, 32)],
    matrix={"HMMA": 8},
    waits=1,
    releases=1,
)
LAUNCH = Launch("_linear_kernel", (1,), None, pdl=True)


def test_good_code_breaks_no_rule():
    assert broken_rules("sm_90", LAUNCH, GOOD) == []


@pytest.mark.parametrize(
    ("key", "launch", "change", "rule"),
    [
        ("sm_90", LAUNCH, {"spills": 3}, "3 spills and 0 bytes of stack"),
        ("sm_90", LAUNCH, {"stack": 16}, "0 spills and 16 bytes of stack"),
        ("sm_86", replace(LAUNCH, pdl=False), {"shared": 120000, "waits": 0, "releases": 0}, "120000 bytes of shared"),
        ("sm_90", LAUNCH, {"accesses": [Access("load", "x", "a.py:1", 2048, 64)]}, "64-bit load of 2048 bytes"),
        ("sm_90", LAUNCH, {"accesses": [Access("store", "", "a.py:1", 2048, 0)]}, "0-bit store"),
        ("sm_90", LAUNCH, {"matrix": {}}, "no matrix instruction"),
        ("sm_90", LAUNCH, {"waits": 0}, "dependent launch is True, with 0 waits"),
        ("sm_90", LAUNCH, {"releases": 0}, "1 waits and 0 releases"),
        ("sm_90", replace(LAUNCH, pdl=False), {"waits": 0, "releases": 0}, "no programmatic dependent launch"),
    ],
)
def test_each_rule_can_be_broken(key, launch, change, rule):
    (broken,) = broken_rules(key, launch, replace(GOOD, **change))
    assert rule in broken


@pytest.mark.parametrize(
    ("key", "registers", "shared", "warps", "programs"),
    [
        ("sm_90", 32, 0, 4, 16),  # 64 warps
        ("sm_90", 255, 0, 4, 2),  # 65,536 registers, 32,768 of them a program
        ("sm_90", 32, 112 * 1024, 4, 2),  # 228 KiB, 113 of them a program
        ("sm_86", 32, 0, 1, 16),  # programs
        ("sm_120", 40, 48 * 1024, 8, 2),  # 100 KiB
    ],
)
def test_occupancy(key, registers, shared, warps, programs):
    assert occupancy(key, replace(GOOD, registers=registers, shared=shared, warps=warps)) == programs


TTGIR = """
#loc = loc("/some/where/linear.py":36:0)
#loc2 = loc("/some/where/few.py":141:20)
#loc3 = loc("/some/where/few.py":9:9)
#loc4 = loc("x"(#loc2))
#loc5 = loc(callsite(#loc4 at #loc))
    %x_71 = ttg.async_copy_global_to_local %x_68, %x_69 mask %m {contiguity = 4 : i32} : tensor<1x512x!tt.ptr<bf16>, #b> -> <1x512xbf16, #s, #smem, mutable> loc(#loc5)
    %w = tt.load %p, %mask_36, %cst_1 : tensor<2048x!tt.ptr<f32>, #blocked1> loc(#loc3)
    tt.store %q, %v : tensor<16x4x!tt.ptr<i64>, #blocked1> loc(#loc)
"""  # noqa: E501
PTX = """
	.loc	3 141 20                        // few.py:141:20 @[ linear.py:86:77 ]
	cp.async.ca.shared.global [ %r121 + 0 ], [ %rd100 + 0 ], 0x8, %r122;
	.loc	3 9 9                           // few.py:9:9
	@%p1 ld.global.v4.b32 { %r66, %r67, %r68, %r69 }, [ %rd24 + 0 ];
	ld.global.v2.b32 { %r66, %r67 }, [ %rd24 + 0 ];
	.loc	1 36 1                          // linear.py:36:1
	st.global.b64 [ %rd1 + 0 ], { %rd2 };
"""


def test_the_reader_finds_tiles_and_widths():
    assert accesses(TTGIR, PTX) == [
        Access("load", "x", "few.py:141", 1024, 64),
        Access("load", "w", "few.py:9", 8192, 64),
        Access("store", "", "linear.py:36", 512, 64),
    ]


BAD_KERNEL = """
import torch, triton, triton.language as tl
from qwenkern.benchmarks.compile_report import broken_rules
from qwenkern.benchmarks.offline.machine_code import launches, read

@triton.jit
def _linear_kernel(out_ptr, x_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at * 3)  # no two neighbours
    y = tl.load(x_ptr + at * 5)
    tl.store(out_ptr + at, tl.cumsum(x, 0) / tl.cumsum(y, 0))

x = torch.empty(65536, dtype=torch.float32, device="meta")
(launch,) = launches("sm_90", lambda: _linear_kernel[(1,)](x, x, BLOCK=4096, num_warps=4, maxnreg=24))
print(*broken_rules("sm_90", launch, read(launch.kernel)), sep="\\n")
"""


def test_a_bad_kernel_breaks_the_rules(compiling, tmp_path):
    (tmp_path / "bad.py").write_text(BAD_KERNEL)
    done = subprocess.run(
        [sys.executable, "bad.py"], capture_output=True, text=True, env=compiling, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "32-bit load of 16384 bytes (x bad.py:9)" in done.stdout
    assert "no matrix instruction" in done.stdout
    assert "spills" in done.stdout


def test_the_interpreter_is_refused(compiling):
    done = _report(compiling | {"TRITON_INTERPRET": "1"})
    assert done.returncode == 2
    assert "TRITON_INTERPRET=1 is set" in done.stderr


@pytest.mark.slow
def test_3b_on_every_architecture(compiling, tmp_path):
    """No rule is broken, and the report has every case on every architecture, except the one that runs in torch."""
    done = _report(compiling, "--json", str(tmp_path / "report.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken rules" in done.stdout
    rows = json.loads((tmp_path / "report.json").read_text())["kernels"]
    ours = [case for case in CASES if case.op != "embedding"]
    expected = {(case.name, tokens, key) for case in ours for tokens in case.tokens for key in DEVICES}
    assert {(row["case"], row["tokens"], row["arch"]) for row in rows} == expected
    few = [row["code"] for row in rows if row["kernel"] == "_linear_kernel" and row["arch"] != "gfx942"]
    # one instruction for every number of tokens
    assert {name for code in few for name in code["matrix"]} == {"HMMA"}


SUMS = r"""
import re, torch
from qwenkern import kernels
from qwenkern.benchmarks.offline.machine_code import launches

def sizes(*shape):
    return torch.empty(*shape, dtype=torch.bfloat16, device="meta")

for arch in ("sm_80", "sm_90", "sm_120"):
    for n, k in ((2048, 2048), (2048, 11008), (151936, 2048)):
        found = set()
        for tokens in (1, 2, 3, 4, 8, 16):
            (launch,) = launches(arch, lambda: kernels.linear(sizes(tokens, k), sizes(n, k)))
            ptx = launch.kernel.asm["ptx"]
            steps = re.findall(r"shfl\.sync\.bfly\.b32.*?, (\d+), 31", ptx[ptx.rindex("mma.sync"):])
            unit = steps[: steps.index("1") + 1]
            assert steps == unit * (len(steps) // len(unit)), steps
            found.add((*unit, *re.findall(r"mma\.sync\S+?\.(m\d+n\d+k\d+)", ptx)[:1]))
        assert len(found) == 1, found
        print(arch, n, k, *found)
"""


@pytest.mark.slow
def test_sums_have_one_order_for_any_number_of_tokens(compiling, tmp_path):
    """Batch invariance needs one matrix instruction, and one order of sums over the slices of K after it."""
    (tmp_path / "sums.py").write_text(SUMS)
    done = subprocess.run(
        [sys.executable, "sums.py"], capture_output=True, text=True, env=compiling, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 9


def _report(environment, *arguments):
    return subprocess.run(
        [sys.executable, str(PROGRAM), *arguments], capture_output=True, text=True, env=environment, check=False
    )
