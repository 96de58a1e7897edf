"""Data movement between lanes, registers and memory in the PTX runner, lane by lane as in NVIDIA's PTX ISA."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ptx.tiny_ptx import run

from qwenkern.benchmarks.offline.ptx.launch import Kernel, Launch
from qwenkern.benchmarks.offline.ptx.memory import GlobalMemory
from qwenkern.benchmarks.offline.ptx.values import LANES

LOAD = "mad.wide.u32 %rd10, %r0, 4, %rd0; ld.global.b32 %r1, [%rd10];"
STORE = "mad.wide.u32 %rd11, %r0, 4, %rd1; st.global.b32 [%rd11], %r2;"


def random() -> np.random.Generator:
    return np.random.default_rng(0)


def lanes_of(text: str, x: np.ndarray) -> np.ndarray:
    """Runs an instruction from %r1 to %r2."""
    return run(f"{LOAD} {text} {STORE}", x, np.zeros(LANES, x.dtype))[1]


@pytest.mark.parametrize("width", [32, 16, 8, 4])
@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shfl(mode, width):
    """9.7.9.7, in its own words."""
    x = np.arange(100, 100 + LANES, dtype=np.int32)
    segment, clamp = 32 - width, 0 if mode == "up" else 31
    for b in (0, 1, 3, 8, 17, 31):
        expected = []
        for lane in range(LANES):
            last, first = (lane & segment) | (clamp & ~segment), lane & segment
            j = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": first | (b & ~segment)}[mode]
            inside = j >= last if mode == "up" else j <= last
            expected.append(x[j if inside else lane])
        found = lanes_of(f"shfl.sync.{mode}.b32 %r2, %r1, {b}, {segment << 8 | clamp}, -1;", x)
        assert found.tolist() == expected


@pytest.mark.parametrize(
    ("name", "t", "of"),
    [
        ("min", "s32", min),
        ("max", "s32", max),
        ("min", "u32", min),
        ("add", "s32", lambda x: int(np.array(x, np.int64).sum().astype(np.int32))),
        ("xor", "b32", lambda x: int(np.bitwise_xor.reduce(np.array(x)))),
    ],
)
def test_redux(name, t, of):
    dtype = np.int32 if t[0] == "s" else np.uint32
    x = random().integers(0, 2**32, LANES, dtype=np.uint32).view(dtype)
    found = lanes_of(f"mov.b32 %r5, -1; redux.sync.{name}.{t} %r2, %r1, %r5;", x)
    assert found.tolist() == [of(x.tolist())] * LANES


def test_parts_of_a_register():
    x = np.array(random().integers(0, 2**32, LANES), np.uint32)
    swapped = lanes_of("mov.b32 {%rs1, %rs2}, %r1; mov.b32 %r2, {%rs2, %rs1};", x)
    assert swapped.tolist() == ((x >> 16) | (x << 16)).tolist()
    both = lanes_of("mov.b64 %rd5, {%r0, %r1}; mov.b64 {_, %r2}, %rd5;", x)
    assert both.tolist() == x.tolist()


@pytest.mark.parametrize(
    ("vector", "t", "bits"), [("v4", "b32", 32), ("v2", "b64", 64), ("v4", "b16", 16), ("", "b8", 8)]
)
def test_vectors(vector, t, bits):
    """Through shared memory, in one instruction each; each lane takes what the last but its own number has written."""
    count = int(vector[1:] or 1)
    x = random().integers(0, 256, (LANES, count * bits // 8), dtype=np.uint8)
    prefix = {8: "%rs", 16: "%rs", 32: "%r", 64: "%rd"}[bits]
    registers = ", ".join(f"{prefix}{20 + at}" for at in range(count))
    registers, vector = (f"{{{registers}}}", f".{vector}") if vector else (registers, "")
    size = count * bits // 8
    body = f"""
        mad.wide.u32 %rd10, %r0, {size}, %rd0; ld.global{vector}.{t} {registers}, [%rd10];
        mov.b32 %r5, smem; mad.lo.s32 %r6, %r0, {size}, %r5; st.shared{vector}.{t} [%r6+{size}], {registers};
        sub.s32 %r7, 31, %r0; mad.lo.s32 %r8, %r7, {size}, %r5; ld.shared{vector}.{t} {registers}, [%r8+{size}];
        mad.wide.u32 %rd11, %r0, {size}, %rd1; st.global{vector}.{t} [%rd11], {registers};
    """
    _, out = run(body, x, np.zeros_like(x), shared_bytes=33 * size)
    assert np.array_equal(out, x[::-1])


def test_signed_loads_fill_a_wider_register():
    x = np.array([-1, 5] * 16, np.int16)
    body = "mad.wide.u32 %rd10, %r0, 2, %rd0; ld.global.s16 %r2, [%rd10];"
    assert run(f"{body} {STORE}", x, np.zeros(LANES, np.int32))[1].tolist() == x.tolist()
    _, found = run(f"{body.replace('s16', 'u16')} {STORE}", x, np.zeros(LANES, np.int32))
    assert found.tolist() == x.view(np.uint16).tolist()


def test_guards_choose_lanes():
    x = np.arange(LANES, dtype=np.int32)
    text = "setp.lt.s32 %p1, %r0, 7; mov.b32 %r2, 1; @%p1 mov.b32 %r2, %r1; @!%p1 add.s32 %r2, %r2, %r1;"
    assert lanes_of(text, x).tolist() == [at if at < 7 else at + 1 for at in range(LANES)]
    text = "mov.b32 %r2, 5; { .reg .pred p; setp.gt.s32 p, %r1, 29; @p mov.b32 %r2, 6; } @%p9 mov.b32 %r2, 7;"
    assert lanes_of(f"mov.pred %p9, 0; {text}", x).tolist() == [5] * 30 + [6] * 2


def test_a_loop():
    text = "mov.b32 %r2, 0; mov.b32 %r3, 0; $AGAIN: add.s32 %r2, %r2, %r1; add.s32 %r3, %r3, 1; "
    text += "setp.lt.s32 %p1, %r3, 10; @%p1 bra $AGAIN; bra.uni $END; mov.b32 %r2, 0; $END:"
    assert lanes_of(text, np.arange(LANES, dtype=np.int32)).tolist() == [10 * at for at in range(LANES)]


def test_where_a_thread_is():
    """Grid and CTA, in each axis."""
    body = """
        mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ctaid.y; mov.u32 %r3, %ctaid.z;
        mov.u32 %r4, %nctaid.x; mov.u32 %r5, %nctaid.y; mov.u32 %r6, %ntid.x; mov.u32 %r7, %laneid;
        mad.lo.s32 %r10, %r3, %r5, %r2; mad.lo.s32 %r10, %r10, %r4, %r1; mad.lo.s32 %r10, %r10, %r6, %r0;
        shl.b32 %r11, %r10, 8; or.b32 %r11, %r11, %r7;
        mad.wide.u32 %rd10, %r10, 4, %rd0; st.global.b32 [%rd10], %r11;
    """
    (out,) = run(body, np.zeros(2 * 3 * 2 * 64, np.int32), grid=(2, 3, 2), num_warps=2, seed=4)
    assert out.tolist() == [at << 8 | at % 32 for at in range(len(out))]


def test_arguments_are_held_as_bits():
    """A float, and a negative number that fills 64 bits."""
    text = """
    .visible .entry k(
        .param .u64 .ptr .global .align 1 k_param_0,
        .param .f32 k_param_1,
        .param .u32 k_param_2
    )
    .reqntid 32
    {
        .reg .b32 %r<3>;
        .reg .b64 %rd<3>;
        .loc 1 2 3 // some.py:2:3
        ld.param.b64 %rd0, [k_param_0];
        ld.param.b32 %r1, [k_param_1];
        ld.param.s32 %rd1, [k_param_2];
        mov.b64 %rd2, {%r1, %r1};
        add.s64 %rd1, %rd1, %rd2;
        st.global.b64 [%rd0], %rd1;
        ret;
    }
    """
    memory = GlobalMemory([(np.zeros(8, np.uint8), np.ones(8, bool))])
    arguments = {"k_param_0": memory.address(0), "k_param_1": 0x3F800000, "k_param_2": -2}
    Launch(Kernel(text), (1, 1, 1), arguments, memory, 0, 1).run(0)
    assert memory.contents(0).view(np.int64)[0] == 0x3F800000_3F800000 - 2


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_and_stmatrix(count, transposed):
    """9.7.14.5.15: row r of matrix i lies at the address of lane 8 i + r, here in any order. Lane l gets two elements
    of row l / 4, or of that column."""
    draw = random()
    matrices = draw.integers(0, 2**16, (count, 8, 8), dtype=np.uint16)
    order = draw.permutation(8 * count)
    rows = np.zeros((8 * count, 8), np.uint16)
    rows[order] = matrices.reshape(-1, 8)
    addresses = np.concatenate((order * 16, draw.integers(0, 9999, LANES - 8 * count))).astype(np.int32)
    registers = "{" + ", ".join(f"%r{20 + at}" for at in range(count)) + "}"
    name = f"sync.aligned.m8n8.x{count}{'.trans' if transposed else ''}.shared.b16"
    fill = f"""
        mad.wide.u32 %rd10, %r0, 4, %rd0; ld.global.b32 %r1, [%rd10];
        mov.b32 %r5, 0; mad.wide.u32 %rd11, %r0, 16, %rd1; setp.lt.s32 %p1, %r0, {8 * count};
        shl.b32 %r6, %r0, 4;
    """
    body = f"""{fill}
        @%p1 ld.global.v4.b32 {{%r10, %r11, %r12, %r13}}, [%rd11];
        @%p1 st.shared.v4.b32 [%r6], {{%r10, %r11, %r12, %r13}};
        ldmatrix.{name} {registers}, [%r1];
    """
    for at in range(count):
        body += f"mad.wide.u32 %rd12, %r0, 4, %rd2; st.global.b32 [%rd12+{128 * at}], %r{20 + at};"
    *_, found = run(body, addresses, rows, np.zeros((count, LANES), np.uint32), shared_bytes=128 * count)
    expected = np.zeros((count, LANES, 2), np.uint16)
    for at, lane, half in np.ndindex(*expected.shape):
        row, column = lane // 4, 2 * (lane % 4) + half
        expected[at, lane, half] = matrices[at, column, row] if transposed else matrices[at, row, column]
    assert np.array_equal(found.view(np.uint16).reshape(expected.shape), expected)

    body = fill
    for at in range(count):
        body += f"mad.wide.u32 %rd12, %r0, 4, %rd2; ld.global.b32 %r{20 + at}, [%rd12+{128 * at}];"
    body += f"""
        stmatrix.{name} [%r1], {registers};
        @%p1 ld.shared.v4.b32 {{%r10, %r11, %r12, %r13}}, [%r6];
        @%p1 st.global.v4.b32 [%rd11], {{%r10, %r11, %r12, %r13}};
    """
    _, stored, _ = run(body, addresses, np.zeros_like(rows), found, shared_bytes=128 * count)
    assert np.array_equal(stored, rows)


@pytest.mark.parametrize(("t", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_mma(t, dtype):
    """9.7.14.5.8: fragments of m16n8k16, element by element. Sums of few bits, so that their order does not matter."""
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randint(-64, 65, size, generator=generator) / 64 for size in ((16, 16), (16, 8)))
    c = torch.randint(-999, 1000, (16, 8), generator=generator) / 64
    bits = [each.to(dtype).view(torch.int16).numpy().view(np.uint16) for each in (a, b)]
    left, right = np.zeros((4, LANES, 2), np.uint16), np.zeros((2, LANES, 2), np.uint16)
    added = np.zeros((4, LANES), np.float32)
    for lane in range(LANES):
        group, in_group = lane >> 2, lane % 4
        for i in range(8):
            row = group if i in (0, 1, 4, 5) else group + 8
            left[i // 2, lane, i % 2] = bits[0][row, in_group * 2 + (i & 1) + (0 if i < 4 else 8)]
        for i in range(4):
            right[i // 2, lane, i % 2] = bits[1][in_group * 2 + (i & 1) + (0 if i < 2 else 8), group]
            added[i, lane] = c[group if i < 2 else group + 8, in_group * 2 + (i & 1)]
    body = "shl.b32 %r1, %r0, 2;"
    for buffer, (count, first) in enumerate(((4, 10), (2, 14), (4, 16))):
        body += f"mad.wide.u32 %rd10, %r0, 4, %rd{buffer};"
        body += "".join(f"ld.global.b32 %r{first + at}, [%rd10+{128 * at}];" for at in range(count))
    body += f"mma.sync.aligned.m16n8k16.row.col.f32.{t}.{t}.f32 {{%r20,%r21,%r22,%r23}}, {{%r10,%r11,%r12,%r13}},"
    body += "{%r14,%r15}, {%r16,%r17,%r18,%r19}; mad.wide.u32 %rd11, %r0, 4, %rd3;"
    body += "".join(f"st.global.b32 [%rd11+{128 * at}], %r{20 + at};" for at in range(4))
    *_, found = run(body, left, right, added, np.zeros_like(added))
    expected = (a @ b + c).numpy()
    for lane, i in np.ndindex(LANES, 4):
        assert found[i, lane] == expected[(lane >> 2) + (8 if i > 1 else 0), lane % 4 * 2 + (i & 1)]


@pytest.mark.parametrize("size", [4, 8, 16])
def test_asynchronous_copies(size):
    """In groups, one waited for after the other; a lane that copies nothing fills with zeros and reads nowhere."""
    x = random().integers(1, 256, (2, LANES, size), dtype=np.uint8)
    body = f"""
        mad.wide.u32 %rd10, %r0, {size}, %rd0; mad.lo.s32 %r1, %r0, {size}, 0;
        setp.lt.s32 %p1, %r0, 20; selp.b32 %r2, {size}, 0, %p1; selp.b64 %rd11, %rd10, 3, %p1;
        cp.async.ca.shared.global [%r1], [%rd10+{LANES * size}], {size}; cp.async.commit_group;
        cp.async.ca.shared.global [%r1+{LANES * size}], [%rd11], {size}, %r2; cp.async.commit_group;
        mad.wide.u32 %rd12, %r0, {size}, %rd1; cp.async.wait_group 1;
    """
    part = {4: "b32", 8: "b64", 16: "v2.b64"}[size]
    registers = {4: "%r5", 8: "%rd5", 16: "{%rd5, %rd6}"}[size]
    for wait, at in (("", 0), ("cp.async.wait_all;", LANES * size)):
        body += f"{wait} ld.shared.{part} {registers}, [%r1+{at}]; st.global.{part} [%rd12+{at}], {registers};"
    _, out = run(body, x, np.zeros_like(x), shared_bytes=2 * LANES * size)
    assert np.array_equal(out[0], x[1])
    assert np.array_equal(out[1, :20], x[0, :20])
    assert not out[1, 20:].any()


@pytest.mark.parametrize("seed", range(3))
def test_atomic_counting(seed):
    """128 threads of each of 5 CTAs take numbers, all different ones."""
    body = """
        mov.b32 %r1, 1; atom.global.gpu.acq_rel.add.u32 %r2, [%rd0], %r1;
        mad.wide.u32 %rd10, %r2, 4, %rd1; mov.b32 %r3, 7; atom.global.gpu.relaxed.add.u32 %r4, [%rd10], %r3;
    """
    counter, taken = run(body, np.zeros(1, np.int32), np.zeros(640, np.int32), grid=(5, 1, 1), num_warps=4, seed=seed)
    assert counter.tolist() == [640]
    assert taken.tolist() == [7] * 640


def test_other_atomics():
    body = "atom.global.gpu.relaxed.{0} %r2, [%rd0], %r0; mad.wide.u32 %rd11, %r0, 4, %rd1; st.global.b32 [%rd11], %r2;"
    after, before = run(body.format("max.s32"), np.full(1, 5, np.int32), np.zeros(LANES, np.int32))
    assert (after.tolist(), before.tolist()) == ([31], [*[5] * 6, *range(5, 31)][:LANES])
    after, before = run(body.format("exch.b32"), np.full(1, 5, np.int32), np.zeros(LANES, np.int32))
    assert (after.tolist(), before.tolist()) == ([31], [5, *range(31)])
