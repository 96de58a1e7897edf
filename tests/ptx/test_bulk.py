"""Bulk copies, tensor maps, and mbarriers: the bytes that are moved, and the faults."""

from __future__ import annotations

import numpy as np
import pytest
from ptx.cases import Case
from ptx.tiny_ptx import run

from qwenkern.benchmarks.offline.ptx.faults import Fault

FIRST = "setp.eq.s32 %p2, %r0, 0; setp.lt.s32 %p1, %r0, 32;"
INIT = f"{FIRST} @%p2 mbarrier.init.shared.b64 [smem], 1; bar.sync 0;"
WAIT = "$WAIT: mbarrier.try_wait.parity.shared.b64 %p3, [smem], 0; @!%p3 bra.uni $WAIT;"
COUNTED = "mbarrier::complete_tx::bytes"
READ = "cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0;"
ELEMENTS = {1: 0, 2: 6, 4: 7}  # u8, f16 and f32, by bytes


def expect(size: int) -> str:
    return f"@%p2 mbarrier.arrive.expect_tx.shared.b64 _, [smem], {size};"


def test_bytes_go_to_shared_memory_and_back():
    body = f"""
        {INIT} {expect(512)} @%p2 cp.async.bulk.shared::cta.global.{COUNTED} [smem+128], [%rd0+16], 512, [smem]; {WAIT}
        shl.b32 %r1, %r0, 2; ld.shared.b32 %r2, [%r1+128]; add.s32 %r2, %r2, 1; st.shared.b32 [%r1+640], %r2;
        fence.proxy.async.shared::cta; bar.sync 0;
        @%p2 cp.async.bulk.global.shared::cta.bulk_group [%rd1+32], [smem+640], 512; {READ}
    """
    given, out = np.arange(132, dtype=np.int32), np.zeros(136, np.int32)
    out = run(body, given, out, num_warps=4, shared_bytes=1152)[1]
    assert out.tolist() == [0] * 8 + list(range(5, 133))


def make_map(at: str, source: str, element: int, sizes: list[int], box: list[int], strides: list[int], row: int) -> str:
    """A tensor map, made in shared memory at a byte and put into buffer 2. Innermost dimensions first."""
    fields = [("global_address", "b64", "", source), ("rank", "b32", "", str(len(sizes) - 1))]
    for name, kind, values in (
        ("box_dim", "b32", box),
        ("global_dim", "b32", sizes),
        ("global_stride", "b64", strides),
    ):
        fields += [(name, kind, f"{at_}, ", str(value)) for at_, value in enumerate(values)]
    fields += [("element_stride", "b32", f"{at_}, ", "1") for at_ in range(len(sizes))]
    fields += [("elemtype", "b32", "", str(ELEMENTS[element])), ("interleave_layout", "b32", "", "0")]
    fields += [("swizzle_mode", "b32", "", str({16: 0, 32: 1, 64: 2, 128: 3}[row])), ("fill_mode", "b32", "", "0")]
    lines = [f"mov.b32 %r40, {at}; shl.b32 %r41, %r0, 2; add.s32 %r41, %r40, %r41; mov.b32 %r42, 0;"]
    lines += ["@%p1 st.shared.b32 [%r41], %r42; bar.sync 0;"]
    for name, kind, which, value in fields:
        register = "%rd40" if kind == "b64" else "%r43"
        lines.append(value and f"mov.{kind} {register}, {value};")
        operand = value if name in ("rank", "elemtype", "interleave_layout", "swizzle_mode", "fill_mode") else register
        lines.append(f"@%p2 tensormap.replace.tile.{name}.shared::cta.b1024.{kind} [%r40], {which}{operand};")
    copy = "tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned"
    lines.append(f"bar.sync 0; @%p1 {copy} [%rd2], [%r40], 128;")
    lines.append("@%p1 fence.proxy.tensormap::generic.acquire.gpu [%rd2], 128; bar.sync 0;")
    return "\n".join(lines)


def box_of(tensor: np.ndarray, at: list[int], box: list[int]) -> np.ndarray:
    """Innermost dimensions first; zeros outside."""
    found = np.zeros(box[::-1], tensor.dtype)
    for index in np.ndindex(*found.shape):
        place = tuple(start + step for start, step in zip(at[::-1], index, strict=True))
        if all(0 <= each < size for each, size in zip(place, tensor.shape, strict=True)):
            found[index] = tensor[place]
    return found


def exchanged(data: np.ndarray, row: int) -> np.ndarray:
    """Bytes in rows of 128, as the figures of section 5.5.6 exchange their pieces of 16 bytes."""
    pieces = data.reshape(-1).view(np.uint8).reshape(-1, 8, 16)
    out = np.zeros_like(pieces)
    for line in range(len(pieces)):
        for piece in range(8):
            across = row // 16
            out[line, piece // across * across + (piece % across ^ (line % across))] = pieces[line, piece]
    return out.reshape(-1)


TENSORS = [  # sizes, a box, where it begins, bytes of an element and of a pattern's row
    ([200], [128], [100], 4, 16),
    ([40, 20], [16, 8], [8, 3], 2, 16),
    ([40, 20], [16, 8], [32, 15], 2, 32),
    ([40, 20], [32, 16], [-8, -2], 2, 64),
    ([72, 20], [64, 8], [0, 0], 2, 128),
    ([32, 6, 5], [32, 4, 2], [16, 4, 3], 4, 128),
    ([48, 6, 5], [16, 4, 4], [0, -1, 4], 1, 16),
]


@pytest.mark.parametrize(("sizes", "box", "at", "element", "row"), TENSORS)
def test_boxes_of_tensors(sizes, box, at, element, row):
    """To shared memory and, from there, to the same place of another tensor."""
    dtype = {1: np.uint8, 2: np.uint16, 4: np.uint32}[element]
    strides = [element * int(np.prod(sizes[:count])) for count in range(1, len(sizes))]
    tensor = np.arange(1, np.prod(sizes) + 1).astype(dtype).reshape(sizes[::-1])
    size = int(np.prod(box)) * element
    coordinates = "{" + ", ".join(map(str, at)) + "}"
    rank = len(sizes)
    body = f"""
        {INIT} {make_map("1024", "%rd0", element, sizes, box, strides, row)} {expect(size)}
        @%p2 cp.async.bulk.tensor.{rank}d.shared::cta.global.{COUNTED} [smem+2048], [%rd2, {coordinates}], [smem];
        {WAIT} mov.b32 %r10, {size};
        @%p2 cp.async.bulk.global.shared::cta.bulk_group [%rd1], [smem+2048], %r10; {READ}
        {make_map("1024", "%rd3", element, sizes, box, strides, row)}
        @%p2 cp.async.bulk.tensor.{rank}d.global.shared::cta.bulk_group [%rd2, {coordinates}], [smem+2048]; {READ}
    """
    out, copied = np.zeros(size, np.uint8), np.zeros_like(tensor)
    maps = np.zeros(128, np.uint8)
    _, out, _, copied = run(body, tensor, out, maps, copied, num_warps=4, shared_bytes=2048 + size)
    expected = box_of(tensor, at, box)
    assert np.array_equal(out, exchanged(expected, row) if size % 128 == 0 else expected.reshape(-1).view(np.uint8))
    assert set(copied[copied != 0].tolist()) == set(expected[expected != 0].tolist())
    assert np.array_equal(copied[copied != 0], tensor[copied != 0])


def test_phases_of_an_mbarrier():
    """Two warps hand a word to and fro, through two mbarriers of 32 arrivals each."""
    body = f"""
        {FIRST} @%p2 mbarrier.init.shared.b64 [smem], 32; @%p2 mbarrier.init.shared.b64 [smem+8], 32; bar.sync 0;
        mov.b32 %r1, 0; and.b32 %r2, %r0, 31; shl.b32 %r3, %r2, 2; @!%p1 bra.uni $SECOND;
        mov.b32 %r5, 0; $PUT: st.shared.b32 [%r3+16], %r5; mbarrier.arrive.shared.b64 _, [smem]; and.b32 %r4, %r5, 1;
        $FREE: mbarrier.try_wait.parity.shared.b64 %p3, [smem+8], %r4; @!%p3 bra.uni $FREE;
        add.s32 %r5, %r5, 1; setp.lt.s32 %p4, %r5, 5; @%p4 bra $PUT; ret;
        $SECOND: mov.b32 %r5, 0; $TAKE: and.b32 %r4, %r5, 1;
        $FULL: mbarrier.try_wait.parity.shared.b64 %p3, [smem], %r4; @!%p3 bra.uni $FULL;
        ld.shared.b32 %r6, [%r3+16]; add.s32 %r1, %r1, %r6; mbarrier.arrive.shared.b64 _, [smem+8];
        add.s32 %r5, %r5, 1; setp.lt.s32 %p4, %r5, 5; @%p4 bra $TAKE;
        mad.wide.u32 %rd10, %r2, 4, %rd0; st.global.b32 [%rd10], %r1;
    """
    for seed in range(3):
        assert run(body, np.zeros(32, np.int32), num_warps=2, shared_bytes=144, seed=seed)[0].tolist() == [10] * 32


def test_barriers_with_numbers():
    """Warps 0 and 1 meet at one, 2 and 3 at another one. All store and read the same lane of the pair's other warp."""
    body = f"""
        {FIRST} shr.u32 %r1, %r0, 6; shl.b32 %r2, %r0, 2; st.shared.b32 [%r2], %r0; setp.eq.s32 %p4, %r1, 0;
        @%p4 bra $ONE; barrier.sync 2, 64; bra.uni $ON; $ONE: bar.sync 1, 64;
        $ON: xor.b32 %r2, %r2, 128; ld.shared.b32 %r3, [%r2]; mad.wide.u32 %rd10, %r0, 4, %rd0;
        st.global.b32 [%rd10], %r3;
    """
    for seed in range(3):
        out = run(body, np.zeros(128, np.int32), num_warps=4, shared_bytes=512, seed=seed)[0]
        assert out.tolist() == [at ^ 32 for at in range(128)]
    body = body.replace("xor.b32 %r2, %r2, 128", "xor.b32 %r2, %r2, 256")
    with pytest.raises(Fault, match=r"wrote since the last barrier|never written"):
        run(body, np.zeros(128, np.int32), num_warps=4, shared_bytes=512)


def test_one_lane_is_elected():
    body = """
        elect.sync %r1|%p1, -1; elect.sync _|%p2, -1; mad.wide.u32 %rd10, %r1, 4, %rd0; @%p1 st.global.b32 [%rd10], %r1;
        and.pred %p3, %p1, %p2; @%p3 st.global.b32 [%rd1], 1; setmaxnreg.inc.sync.aligned.u32 232;
    """
    lanes = set()
    for seed in range(8):
        out, same = run(body, np.full(32, -1, np.int32), np.zeros(1, np.int32), seed=seed)
        (lane,) = np.nonzero(out != -1)[0].tolist()
        assert (out[lane], same[0]) == (lane, 1)
        lanes.add(lane)
    assert len(lanes) > 1


# Faults: 128 bytes go to byte 128 of shared memory, and each thread of one warp reads its word


COPY = f"@%p2 cp.async.bulk.shared::cta.global.{COUNTED} [smem+128], [%rd0], 128, [smem];"
LOAD = "shl.b32 %r1, %r0, 2; ld.shared.b32 %r2, [%r1+128];"
STORE = "shl.b32 %r1, %r0, 2; st.shared.b32 [%r1+128], %r0;"
PROXY = "fence.proxy.async.shared::cta;"
OUT = "@%p2 cp.async.bulk.global.shared::cta.bulk_group [%rd1], [smem+128], 128;"
GROUP = "cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0;"
LATER = WAIT.replace("WAIT", "LATER")
NEXT = WAIT.replace("0;", "1;").replace("WAIT", "NEXT")
TX = "@%p2 mbarrier.expect_tx.relaxed.cta.shared.b64 [smem], 64;"
MEET = "bar.sync 1, 64; $B:"
TWO = {"num_warps": 2}
CASES = [
    Case("not waited for", "copy may still write", f"{INIT} {expect(128)} {COPY} ? {LOAD} {LATER}", "", WAIT),
    Case(
        "too many bytes",
        "deadlock: warp 0 for phase 0 of the mbarrier at byte 0, which lacks 0 arrivals and 128 bytes",
        f"{INIT} ? {COPY} {WAIT} {LOAD}",
        expect(256),
        expect(128),
    ),
    Case("too few bytes", "deadlock|copy may still write", f"{INIT} ? {COPY} {WAIT} {LOAD}", expect(64), expect(128)),
    Case("nobody arrives", "lacks 1 arrivals", f"{INIT} ? {COPY} {WAIT} {LOAD}", "", expect(128)),
    Case("the next phase", "deadlock", f"{INIT} {expect(128)} {COPY} {WAIT} {LOAD} ?", NEXT, ""),
    Case("arrives twice", "1 arrivals in phase 0", f"{INIT} {expect(64)} ? {COPY} {WAIT}", expect(64), TX),
    Case(
        "no mbarrier",
        "no mbarrier at byte 0|never written",
        f"{FIRST} bar.sync 0; ? {expect(128)} {COPY} {WAIT} {LOAD}",
        "",
        "@%p2 mbarrier.init.shared.b64 [smem], 1; bar.sync 0;",
    ),
    Case(
        "initialized without a barrier",
        "mbarrier.init|never written",
        f"{FIRST} @%p2 mbarrier.init.shared.b64 [smem], 1; ? {expect(128)} {COPY} {WAIT}",
        "",
        "bar.sync 0;",
        TWO,
    ),
    Case("ends before it lands", "ends while a bulk copy may still write", f"{INIT} {expect(128)} {COPY} ?", "", WAIT),
    Case(
        "over what was stored",
        "writes byte 128 of shared memory asynchronously, which warp 0 stored",
        f"{INIT} {STORE} ? {expect(128)} {COPY} {WAIT}",
        "",
        PROXY,
    ),
    Case(
        "over what others read",
        "read since the last barrier|copy may still write",
        f"{INIT} {expect(128)} {COPY} {WAIT} and.b32 %r0, %r0, 31; {LOAD} ? {expect(128)} {COPY} {NEXT}",
        "",
        "bar.sync 0;",
        TWO,
    ),
    Case(
        "stored without a fence",
        "reads byte 128 of shared memory asynchronously",
        f"{FIRST} {STORE} ? bar.sync 0; {OUT} {READ}",
        "",
        PROXY,
    ),
    Case(
        "written before it is read",
        "asynchronous operation may still read",
        f"{FIRST} {STORE} {PROXY} {OUT} ? {STORE} {READ}",
        "",
        READ,
    ),
    Case("ends before it is read", "may still read shared memory", f"{FIRST} {STORE} {PROXY} {OUT} ?", "", READ),
    Case(
        "in no group",
        "may still read shared memory",
        f"{FIRST} {STORE} {PROXY} {OUT} ? cp.async.bulk.wait_group.read 0;",
        "",
        "cp.async.bulk.commit_group;",
    ),
    Case(
        "another lane's group",
        "may still read shared memory",
        f"{FIRST} {STORE} {PROXY} {OUT} setp.eq.s32 %p4, %r0, 1; ? {GROUP}",
        "@%p4 ",
        "@%p2 ",
    ),
    Case(
        "released before it is written",
        "while a bulk copy of warp 0 may still write global memory",
        f"{FIRST} mov.b32 %r8, 1; {STORE} {PROXY} {OUT} cp.async.bulk.commit_group; cp.async.bulk.wait_group? 0;"
        "@%p2 atom.global.gpu.acq_rel.add.u32 %r4, [%rd0], %r8;",
        ".read",
        "",
    ),
    Case(
        "no multiple of 16",
        "100 bytes",
        f"{INIT} {expect(128)} mov.b32 %r9, ?; {COPY.replace('128, [smem]', '%r9, [smem]')} {WAIT}",
        "100",
        "128",
    ),
    Case(
        "out of bounds", "out of bounds", f"{INIT} {expect(128)} {COPY.replace('[%rd0]', '[%rd0+?]')} {WAIT}", "64", "0"
    ),
    Case(
        "numbers of threads differ",
        "different numbers of warps|not all warps reach",
        f"{FIRST} @%p1 bra $A; bar.sync 1, ?; bra.uni $B; $A: {MEET}",
        "32",
        "64",
        TWO,
    ),
    Case(
        "at different barriers",
        "deadlock: warp . at barrier",
        f"{FIRST} @%p1 bra $A; bar.sync ?, 64; bra.uni $B; $A: {MEET}",
        "2",
        "1",
        TWO,
    ),
]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_fault_is_reported(case, seed):
    case.check("", np.zeros(32, np.int32), np.zeros(32, np.int32), shared_bytes=256, seed=seed)
