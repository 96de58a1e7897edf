"""The compile report: its rules, its reader of machine code, and Qwen2.5-3B on every architecture."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from qwenkern.benchmarks import compile_report
from qwenkern.benchmarks.compile_report import broken_rules
from qwenkern.benchmarks.offline import unpacking
from qwenkern.benchmarks.offline.machine_code import DEVICES, Access, Code, Launch, Tile, accesses, loop, occupancy
from qwenkern.benchmarks.ops.cases import CASES
from qwenkern.kernels.weights.fp8_products import Fp8Numbers
from qwenkern.kernels.weights.group_products import GroupNumbers

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
# 4 bits, groups of 128 and no sub-scales; 16,384 weights of 0.5 bytes, whose bytes take 622 cycles of an SM to arrive
FORM = GroupNumbers(4, 128, 128, False, False, True, 0, 8)
TILE = Tile(FORM, rows=32, depth=512, tokens=2, streams_x=False, has_norm=True)


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
    ("name", "element", "width", "kernel", "said"),
    [
        ("v", 8, 64, "_decode_attention_kernel", []),
        ("v", 8, 32, "_decode_attention_kernel", ["32-bit load of 8192 bytes (v dense.py:46)"]),
        ("v", 16, 64, "_decode_attention_kernel", ["64-bit load of 8192 bytes (v dense.py:46)"]),
        ("k", 8, 64, "_prefill_attention_kernel", ["64-bit load of 8192 bytes (k dense.py:46)"]),
        ("v", 8, 64, "_linear_kernel", ["64-bit load of 8192 bytes (v dense.py:46)"]),
        ("bits", 32, 32, "_dequantise_kernel", []),
        ("words", 32, 32, "_dequantise_kernel", ["32-bit load of 8192 bytes (words dense.py:46)"]),
    ],
)
def test_only_some_loads_may_be_narrow(name, element, width, kernel, said):
    access = Access("load", name, "dense.py:46", 8192, width, element)
    assert broken_rules("sm_90", replace(LAUNCH, name=kernel), replace(GOOD, accesses=[access])) == said


@pytest.mark.parametrize(
    ("form", "name", "said"),
    [
        (FORM._replace(bits=8, zero=128), "x", []),  # q8_0
        (FORM._replace(bits=8, zero=128), "codes", ["64-bit load of 8192 bytes (codes few_tokens.py:170)"]),
        (FORM._replace(bits=8, zero=0), "x", ["64-bit load of 8192 bytes (x few_tokens.py:170)"]),
        (FORM, "x", ["64-bit load of 8192 bytes (x few_tokens.py:170)"]),
    ],
)
def test_x_beside_signed_bytes_may_be_loaded_in_halves(form, name, said):
    access = Access("load", name, "few_tokens.py:170", 8192, 64, 16)
    launch = replace(LAUNCH, tile=replace(TILE, form=form))
    assert broken_rules("sm_90", launch, replace(GOOD, accesses=[access])) == said


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
        Access("load", "x", "few.py:141", 1024, 64, 16),
        Access("load", "w", "few.py:9", 8192, 64, 32),
        Access("store", "", "linear.py:36", 512, 64, 64),
    ]


SASS = """
        /*0000*/                   LDG.E R0, [R2.64] ;
        /*0010*/                   LOP3.LUT R1, R0, 0xf000f, R4, 0xea, !PT ;
        /*0020*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0030*/              @!P0 BRA 0x10 ;
        /*0040*/                   SHF.R.U32.HI R1, RZ, 0x4, R0 ;
        /*0050*/                   PRMT R1, R0, 0x5410, R1 ;
        /*0060*/                   LOP3.LUT R1, R0, 0xf000f, R4, 0xea, !PT ;
        /*0070*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0080*/              @P0  BRA 0x40 ;
        /*0090*/                   IADD3 R0, R0, 0x1, RZ ;
        /*00a0*/              @P1  BRA 0x90 ;
        /*00b0*/                   EXIT ;
        /*00c0*/                   BRA 0xc0;
"""


def test_the_reader_finds_the_largest_loop_with_products():
    assert loop(SASS) == ["SHF", "PRMT", "LOP3", "HMMA", "BRA"]
    straight = SASS.replace("BRA", "NOP")
    assert len(loop(straight)) == 13


@pytest.mark.parametrize(
    ("tile", "limit"),
    [
        (TILE, 1.25),
        (replace(TILE, form=FORM._replace(bits=8)), 1.6),
        (replace(TILE, form=Fp8Numbers()), 1.6),
        (replace(TILE, form=FORM._replace(group=32, has_sub_scales=True)), 1.25 + 2 / 32),
        (replace(TILE, form=FORM._replace(group=32, has_sub_scales=True, has_offset=True)), 1.25 + 4 / 32),
        (replace(TILE, tokens=16, streams_x=True, has_norm=False), 1.25 + 0.5 * 16 / 32),
        (replace(TILE, tokens=16, streams_x=True), 1.25 + 1.5 * 16 / 32),
    ],
)
def test_what_unpacks_is_counted_a_weight(tile, limit):
    """160 instructions of each of 128 threads."""
    found = unpacking.unpacking(tile, replace(GOOD, unpacking=160), 0.5)
    assert (found.a_weight, found.limit) == (160 * 4 * 32 / 16384, limit)
    assert not unpacking.broken_rules("sm_80", found, 1, 0.5)
    (said,) = unpacking.broken_rules("sm_80", replace(found, a_weight=limit + 0.01), 1, 0.5)
    assert said == f"{limit + 0.01:.2f} instructions a weight unpack it, and {limit:.2f} may"


@pytest.mark.parametrize(
    ("turn", "tokens", "key", "said"),
    [
        (600, 1, "sm_90", []),
        (700, 1, "sm_90", ["its instructions take 1.13 times as long as its bytes, and 1.10 may"]),
        (700, 1, "sm_80", []),
        (700, 16, "sm_90", []),
        (1800, 16, "sm_90", ["its instructions take 2.89 times as long as its bytes, and 2.80 may"]),
    ],
)
def test_instructions_are_issued_while_the_bytes_arrive(turn, tokens, key, said):
    """Four warps: one for each scheduler."""
    found = unpacking.unpacking(TILE, replace(GOOD, turn=turn), 0.5)
    assert found.issued == pytest.approx(turn / (8192 / (3.05e12 / 132 / 1.755e9)))
    assert unpacking.broken_rules(key, found, tokens, 0.5) == said


@pytest.mark.parametrize(
    ("grid", "depth", "turns"),
    [
        ((132,), 2048, 6),  # 688 tiles, one program on each SM
        ((264, 1), 2048, 6),  # three for each, of which an SM has two
        ((688, 1), 512, 24),  # each SM has up to six, of four blocks
        ((688, 2), 512, 22),  # of two blocks, up to eleven
    ],
)
def test_the_sm_that_has_most_to_do_counts(grid, depth, turns):
    launch = replace(LAUNCH, grid=grid, tile=replace(TILE, depth=depth))
    found = unpacking.seconds_to_issue(launch, replace(GOOD, turn=100), (22016, 2048))
    assert found == pytest.approx(turns * 100 / 1.755e9)


def test_the_formats_of_the_report():
    few, many, cached = (next(case for case in CASES if case.name == name) for name in ("gate_up", "qkv", "attention"))
    report = ["dense", "int4", "q6_k", "int8", "fp8"]
    assert [weights for weights, _ in compile_report.variants(few, 1, "sm_80", [], [])] == report
    assert {"q4_k", "q5_0", "q8_0"} < {weights for weights, _ in compile_report.variants(few, 16, "sm_90", [], [])}
    assert [weights for weights, _ in compile_report.variants(few, 512, "sm_80", [], [])] == report
    assert compile_report.variants(many, 1, "sm_90", [], []) == [("dense", "dense")]
    assert compile_report.variants(cached, 1, "sm_90", [], []) == [("dense", "dense")]
    assert compile_report.variants(few, 1, "sm_90", ["q4_1"], []) == [("q4_1", "dense")]
    rope = next(case for case in CASES if case.name == "qkv_rope")
    assert [pages for _, pages in compile_report.variants(rope, 512, "sm_80", [], [])] == [
        "dense",
        "float16",
        "int8",
        "fp8",
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
    done = _report(compiling, "--weights", "dense", "--json", str(tmp_path / "report.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken rules" in done.stdout
    rows = json.loads((tmp_path / "report.json").read_text())["kernels"]
    ours = [case for case in CASES if case.op != "embedding"]
    expected = {(case.name, tokens, key) for case in ours for tokens in case.tokens for key in DEVICES}
    assert {(row["case"], row["tokens"], row["arch"]) for row in rows} == expected
    few = [row["code"] for row in rows if row["kernel"] == "_linear_kernel" and row["arch"] != "gfx942"]
    # one instruction for every number of tokens
    assert {name for code in few for name in code["matrix"]} == {"HMMA"}


@pytest.mark.slow
def test_quantised_weights_and_pages_on_an_h100(compiling, tmp_path):
    """No rule is broken there either. The other formats are compiled by the report alone, which takes minutes."""
    chosen = ["--arch", "sm_90", "--weights", "int4", "--pages", "int8", "--json", str(tmp_path / "report.json")]
    done = _report(compiling, *chosen)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken rules" in done.stdout
    rows = json.loads((tmp_path / "report.json").read_text())["kernels"]
    assert "int4" in {row["weights"] for row in rows if row["kernel"] == "_linear_kernel"}
    assert "int8" in {row["pages"] for row in rows if "attention" in row["kernel"]}


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
