"""The PTX runner reports each kind of fault. Each small program has one fault, and runs without it."""

from __future__ import annotations

import numpy as np
import pytest
from ptx.cases import Case
from ptx.tiny_ptx import run

from qwenkern.benchmarks.offline.ptx import launch, warp
from qwenkern.benchmarks.offline.ptx.faults import Fault

# Each thread's number in %r3, and 1 in %r8; its own word of buffer 0 and buffer 1 at [%rd10] and [%rd11], of shared
# memory at [%r1], and at [%r2] that of the same lane of the other warp.
PRELUDE = """
    mov.b32 %r3, %r0; mov.b32 %r8, 1;
    mad.wide.u32 %rd10, %r0, 4, %rd0; mad.wide.u32 %rd11, %r0, 4, %rd1;
    mov.b32 %r1, smem; mad.lo.s32 %r1, %r0, 4, %r1; xor.b32 %r2, %r1, 128; and.b32 %r5, %r1, 127;
    setp.lt.s32 %p1, %r0, 32; setp.eq.s32 %p2, %r0, 0; mov.pred %p3, 0;
"""  # %p1: the first warp; %p2: the first thread; %r5: one word for the same lane of both warps
COPY = "cp.async.ca.shared.global [%r1], [%rd11], 4; cp.async.commit_group;"
ARRIVED = "cp.async.wait_group 0;"
VALUES = "two lanes store different values"
SINCE = r"(reads|writes) byte \d+ of shared memory, which warp \d (wrote|read) since the last barrier"


TWO = {"num_warps": 2}
PDL = {"is_dependent": True}
HALF = {"valid": [np.arange(256) < 128, np.ones(256, bool)]}
ROWS = {"valid": [np.arange(256) // 4 % 8 != 5, np.ones(256, bool)]}  # of seven words each, with gaps between
GDC = "griddepcontrol.wait;"
EARLY = "before griddepcontrol.wait"
WAIT = "griddepcontrol.launch_dependents; ? "

GLOBAL = [
    Case("store behind", "4 bytes at byte 256 of buffer 0", "st.global.b32 [%rd10+?], %r3;", "132", "0"),
    Case("load behind", "out of bounds", "ld.global.b32 %r4, [%rd10+?];", "132", "0"),
    Case("load before", "out of bounds", "ld.global.b32 %r4, [%rd10+?];", "-4", "0"),
    Case("copy behind", "out of bounds", "cp.async.ca.shared.global [%r1], [%rd10+?], 4;", "132", "0"),
    Case("atomic behind", "out of bounds", "atom.global.gpu.relaxed.add.u32 %r4, [%rd10+?], %r3;", "132", "0"),
    Case("prefetch behind", "out of bounds", "prefetch.global.L2 [%rd10+?];", "132", "0"),
    Case("no element", "4 bytes at byte 128 of buffer 0", "st.global.b32 [%rd10+?], %r3;", "4", "0", HALF),
    Case(
        "across a gap",
        "16 bytes at byte 16 of buffer 0",
        "mad.wide.u32 %rd12, %r0, 16, %rd0; ?ld.global.v4.b32 {%r20, %r21, %r22, %r23}, [%rd12];",
        "",
        "@%p2 ",
        ROWS,
    ),
    Case(
        "address of 32 bits",
        "is no address of global memory",
        "cvt.u32.u64 %r4, %rd10; cvt.u64.u32 %rd12, %r4; st.global.b32 [?], %r3;",
        "%rd12",
        "%rd10",
    ),
    Case("misaligned", "misaligned: 4 bytes of global", "ld.global.b32 %r4, [%rd10+?];", "2", "0"),
    Case("two values", VALUES, "st.global.b32 [%rd0], ?;", "%r3", "%r8"),
    Case(
        "load early",
        EARLY,
        f"{WAIT} ld.global.b32 %r4, [%rd10];",
        "",
        GDC,
        PDL,
    ),
    Case(
        "store early",
        EARLY,
        f"{WAIT} st.global.b32 [%rd10], %r3;",
        "",
        GDC,
        PDL,
    ),
    Case("copy early", EARLY, f"{WAIT} {COPY}", "", GDC, PDL),
    Case(
        "atomic early",
        EARLY,
        f"{WAIT} atom.global.gpu.relaxed.add.u32 %r4, [%rd10], %r3;",
        "",
        GDC,
        PDL,
    ),
    Case("never waits", "ends without griddepcontrol.wait", WAIT, "", GDC, PDL),
    Case(
        "release without a barrier",
        r"warp 0 releases what was stored .* the stores of warp 1",
        "st.global.b32 [%rd10], %r3; ? @%p2 atom.global.gpu.acq_rel.add.u32 %r4, [%rd1], %r8;",
        "",
        "bar.sync 0;",
        TWO,
    ),
]
SHARED = [
    Case(
        "read while another warp writes",
        f"{SINCE}|was never written",
        "st.shared.b32 [%r1], %r3; ? ld.shared.b32 %r4, [%r2];",
        "",
        "bar.sync 0;",
        TWO,
    ),
    Case(
        "one writes, one reads",
        SINCE,
        "st.shared.b32 [%r1], %r8; bar.sync 0; @%p1 st.shared.b32 [%r1], %r3; ? @!%p1 ld.shared.b32 %r4, [%r2];",
        "",
        "bar.sync 0;",
        TWO,
    ),
    Case(
        "matrices",
        SINCE,
        """
            st.shared.b32 [%r1], %r8; mad.lo.s32 %r6, %r5, 4, 0; and.b32 %r6, %r6, 240; bar.sync 0;
            @%p1 st.shared.b32 [%r1], %r3; ?
            @!%p1 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r4}, [%r6];
        """,
        "",
        "bar.sync 0;",
        TWO,
    ),
    Case("two warps write", SINCE, "st.shared.b32 [%r5], ?;", "%r3", "%r8", TWO),
    Case(
        "two lanes write",
        VALUES,
        "mov.b32 %r6, smem; st.shared.b32 [%r6], ?;",
        "%r3",
        "%r8",
    ),
    Case("never written", "which was never written", "? ld.shared.b32 %r4, [%r1];", "", "st.shared.b32 [%r1], %r3;"),
    Case("out of bounds", "4 bytes of shared memory at 384", "st.shared.b32 [%r1+?], %r3;", "384", "0"),
    Case("below", "out of bounds: 4 bytes of shared", "st.shared.b32 [%r1+?], %r3;", "-4", "0"),
    Case("misaligned", "misaligned: 4 bytes of shared", "st.shared.b32 [%r1+?], %r3;", "2", "0"),
    Case(
        "copy not waited for",
        "copy may still write",
        f"{COPY} ? ld.shared.b32 %r4, [%r1];",
        "",
        ARRIVED,
    ),
    Case(
        "the last but one waited for",
        "copy may still write",
        f"{COPY} {COPY.replace('[%r1]', '[%r1+128]')} cp.async.wait_group ?; ld.shared.b32 %r4, [%r1+128];",
        "1",
        "0",
    ),
    Case(
        "not committed",
        "copy may still write",
        "cp.async.ca.shared.global [%r1], [%rd11], 4; ? cp.async.wait_group 0; ld.shared.b32 %r4, [%r1];",
        "",
        "cp.async.commit_group;",
    ),
    Case(
        "copy of another warp",
        f"{SINCE}|was never written|copy may still write",
        f"{COPY} cp.async.wait_group 0; ? ld.shared.b32 %r4, [%r2];",
        "",
        "bar.sync 0;",
        TWO,
    ),
    Case(
        "waited for behind the barrier",
        f"{SINCE}|copy may still write",
        f"{COPY} ? ld.shared.b32 %r4, [%r2];",
        "bar.sync 0; cp.async.wait_group 0;",
        "cp.async.wait_group 0; bar.sync 0;",
        TWO,
    ),
    Case(
        "copy over what is read",
        f"{SINCE}|copy may still write",
        f"st.shared.b32 [%r1], %r3; bar.sync 0; ld.shared.b32 %r4, [%r2]; ? {COPY}",
        "",
        "bar.sync 0;",
        TWO,
    ),
    Case("store over a copy", "copy may still write", f"{COPY} ? st.shared.b32 [%r1], %r3;", "", "cp.async.wait_all;"),
    Case("copy over a copy", "copy may still write", f"{COPY} ? {COPY}", "", "cp.async.wait_all;"),
]
CONTROL = [
    Case(
        "a barrier for one warp",
        "not all warps reach: 1 of 2 ended",
        "?bra $END; bar.sync 0; $END:",
        "@%p1 ",
        "@%p3 ",
        TWO,
    ),
    Case("a branch for one lane", "divergent branch: taken by 1 of a warp's 32", "?bra $END; $END:", "@%p2 ", "@%p1 "),
    Case("an end for one lane", "divergent branch: ret by 1 of a warp's 32", "?ret;", "@%p2 ", "@%p1 "),
    Case("a barrier for one lane", "bar.sync by 1 of a warp's 32", "?bar.sync 0;", "@%p2 ", "@%p1 "),
    Case("a shuffle for one lane", "by 1 of", "?shfl.sync.bfly.b32 %r4, %r3, 1, 31, -1;", "@%p2 ", "@%p1 "),
    Case("a shuffle among some", "for the lanes 0xf", "shfl.sync.bfly.b32 %r4, %r3, 1, 31, ?;", "15", "-1"),
    Case("no end", "1000 instructions without a barrier", "$AGAIN: ?bra $AGAIN;", "@%p1 ", "@%p3 "),
    Case("division by zero", "division of integers by zero", "div.s32 %r4, %r8, ?;", "%r3", "%r8"),
]
OUT = "st.global.b32 [%rd10], %r4;"
NEVER = "comes from a register that lane {} has never written"
REGISTERS = [
    Case("stored", NEVER.format(0), "st.global.b32 [%rd10], ?;", "%r50", "%r3"),
    Case("stored in shared memory", NEVER.format(0), "st.shared.b32 [%r1], ?;", "%r50", "%r3"),
    Case("computed with", NEVER.format(0), f"add.s32 %r4, ?, 1; {OUT}", "%r50", "%r3"),
    Case("an address", "an address", "mad.wide.u32 %rd12, ?, 4, %rd0; ld.global.b32 %r4, [%rd12];", "%r50", "%r3"),
    Case("a guard", "a guard comes", "@? mov.b32 %r4, 1;", "%p50", "%p1"),
    Case("a sum of counters", NEVER.format(0), "atom.global.gpu.relaxed.add.u32 %r4, [%rd10], ?;", "%r50", "%r3"),
    Case(
        "some lanes",
        NEVER.format(1),
        "? @%p2 mov.b32 %r50, 1; st.global.b32 [%rd10], %r50;",
        "",
        "mov.b32 %r50, 0;",
    ),
    Case(
        "from another lane",
        NEVER.format(0),
        "? @%p2 mov.b32 %r50, 1; shfl.sync.bfly.b32 %r4, %r50, 1, 31, -1; st.global.b32 [%rd10], %r4;",
        "",
        "mov.b32 %r50, 0;",
    ),
    Case(
        "half",
        NEVER.format(0),
        f"mov.b64 %rd50, {{%r3, ?}}; mov.b64 {{_, %r4}}, %rd50; {OUT}",
        "%r50",
        "%r8",
    ),
]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("case", [*GLOBAL, *SHARED, *CONTROL, *REGISTERS], ids=lambda case: case.name)
def test_a_fault_is_reported(case, seed, monkeypatch):
    monkeypatch.setattr(warp, "STEPS", 1000)
    words = np.arange(64, dtype=np.int32)
    case.check(PRELUDE, words, words, shared_bytes=384, seed=seed)


def test_what_nobody_asks_for_needs_no_value():
    """Lanes that take no part, a source that is not chosen, the other half of a pair."""
    body = """
        @%p2 ld.global.b32 %r50, [%rd10]; add.s32 %r51, %r50, 1; @%p2 st.global.b32 [%rd10], %r51;
        selp.b32 %r52, %r3, %r60, %p1; st.global.b32 [%rd11], %r52;
        mov.b64 %rd50, {%r3, %r61}; add.f32x2 %rd51, %rd50, %rd50; mov.b64 {%r62, _}, %rd51; st.global.b32 [%rd11], %r3;
    """
    first, second = run(PRELUDE + body, np.full(32, 7, np.int32), np.zeros(32, np.int32))
    assert first.tolist() == [8] + [7] * 31
    assert second.tolist() == list(range(32))


def test_what_comes_in_two_parts_has_a_value():
    body = "@%p2 mov.b32 %r50, 1; @!%p2 mov.b32 %r50, 2; st.global.b32 [%rd10], %r50;"
    assert run(PRELUDE + body, np.zeros(32, np.int32), np.zeros(32, np.int32))[0].tolist() == [1] + [2] * 31


def test_stores_behind_a_barrier_are_none_of_a_release_before():
    body = """
        @%p2 atom.global.gpu.acq_rel.add.u32 %r4, [%rd1], %r8; bar.sync 0; st.global.b32 [%rd10], %r3; bar.sync 0;
        @%p2 atom.global.gpu.acq_rel.add.u32 %r4, [%rd1], %r8;
    """
    _, counter = run(PRELUDE + body, np.zeros(64, np.int32), np.zeros(1, np.int32), num_warps=2)
    assert counter.tolist() == [2]


def test_a_fault_names_its_place():
    body = ".loc 1 2 3 // linear.py:86:20 @[ other.py:3:4 ]\n @%p2 st.global.b32 [%rd10+1], %r3;"
    place = r"warp 0 of CTA \(0, 0, 0\) in tiny, linear.py:86: @%p2 st.global.b32 \[%rd10\+1\], %r3"
    with pytest.raises(Fault, match=place):
        run(PRELUDE + body, np.zeros(64, np.int32), np.zeros(64, np.int32))


def test_the_order_is_random_and_fixed_by_the_seed():
    """Each warp of each CTA takes a number."""
    body = """
        mov.u32 %r4, %ctaid.x; mad.lo.s32 %r4, %r4, 64, %r0; shr.u32 %r5, %r4, 5; and.b32 %r6, %r0, 31;
        setp.eq.s32 %p4, %r6, 0; mad.wide.u32 %rd12, %r5, 4, %rd1;
        @%p4 atom.global.gpu.relaxed.add.u32 %r7, [%rd0], %r8; @%p4 st.global.b32 [%rd12], %r7;
    """
    orders = []
    for seed in (0, 1, 2, 3, 0):
        buffers = np.zeros(1, np.int32), np.zeros(80, np.int32)
        _, numbers = run(PRELUDE + body, *buffers, grid=(40, 1, 1), num_warps=2, seed=seed)
        assert sorted(numbers.tolist()) == list(range(80))
        orders.append(numbers.tolist())
    assert orders[0] == orders[-1]
    first = {numbers.index(0) // 2 for numbers in orders}  # a CTA
    assert len(first) == 4
    assert max(first) - min(first) > launch.RESIDENT


def test_a_copy_lands_when_it_is_waited_for():
    """What it copies is what was there when it began."""
    body = f"""
        st.shared.b32 [%r1], %r8; {COPY} st.global.b32 [%rd11], %r8; bar.warp.sync -1; cp.async.wait_group 0;
        ld.shared.b32 %r4, [%r1]; st.global.b32 [%rd10], %r4;
    """
    out, _ = run(PRELUDE + body, np.zeros(32, np.int32), np.arange(32, dtype=np.int32), shared_bytes=128)
    assert out.tolist() == list(range(32))
