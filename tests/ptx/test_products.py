"""Products of warp groups (wgmma) on tiles in every layout of shared memory, and the faults."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from ptx.cases import Case
from ptx.tiny_ptx import run

ROWS, DEPTH = 64, 64  # of A [64, 64]; B is [64, N]
CODES = {16: 0, 128: 1, 64: 2, 32: 3}  # a descriptor's swizzling mode, by the bytes of a row of its pattern
ARRIVE = """
    setp.eq.s32 %p2, %r0, 0; @%p2 mbarrier.init.shared.b64 [smem], 1; bar.sync 0;
    @%p2 mbarrier.arrive.expect_tx.shared.b64 _, [smem], {size};
    @%p2 cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [smem+1024], [%rd0], {size}, [smem];
    $WAIT: mbarrier.try_wait.parity.shared.b64 %p3, [smem], 0; @!%p3 bra.uni $WAIT;
"""  # an image of shared memory behind its first 1024 bytes


def image(matrix: np.ndarray, row_bytes: int) -> np.ndarray:
    """A matrix [rows, K] of bfloat16's bits, K innermost, as the tiles that the PTX ISA draws: 8 rows of a pattern, in
    each of which the pieces of 16 bytes are exchanged. Columns beyond a pattern's row stand in further tiles. Without
    a pattern, tiles are 8 rows of 16 bytes."""
    rows, columns = matrix.shape
    across, pieces = 2 * columns // row_bytes, row_bytes // 16
    tiles = np.zeros((across, rows, pieces, 8), np.uint16)
    every = {1: 8, 2: 4, 4: 2, 8: 1}[pieces]  # how many rows are alike
    for row in range(rows):
        for tile in range(across):
            for piece in range(pieces):
                first = 8 * (pieces * tile + piece)
                tiles[tile, row, piece ^ (row // every % pieces)] = matrix[row, first : first + 8]
    return tiles.reshape(-1).view(np.uint8)


def descriptor(row_bytes: int, leading: int, stride: int) -> int:
    return CODES[row_bytes] << 62 | stride >> 4 << 32 | leading >> 4 << 16


class Tile(NamedTuple):
    """A matrix in shared memory, and what its descriptors say, without the address."""

    bits: int
    steps: list[int]  # from one product's 16 columns of K to the next, in bytes
    image: np.ndarray
    transposed: bool


def tile(matrix: np.ndarray, row_bytes: int, transposed: bool) -> Tile:
    """Of [rows, K]. K innermost: a product's 32 bytes lie within a row of the pattern, or in two tiles of 16 bytes.
    Transposed: the rows lie innermost, and a product has 16 rows of the memory."""
    rows = len(matrix)
    if transposed:
        # Tiles of row_bytes // 2 rows of the matrix follow each other; within one, K goes down.
        leading, stride = DEPTH * row_bytes, 8 * row_bytes
        if row_bytes == 16:  # the two exchange their meanings
            leading, stride = stride, leading
        steps = [16 * row_bytes * step for step in range(DEPTH // 16)]
        return Tile(descriptor(row_bytes, leading, stride), steps, image(matrix.T, row_bytes), True)
    per_row = row_bytes // 32 or 1
    if row_bytes == 16:
        steps = [2 * step * rows * 16 for step in range(DEPTH // 16)]
    else:
        steps = [step // per_row * rows * row_bytes + step % per_row * 32 for step in range(DEPTH // 16)]
    return Tile(descriptor(row_bytes, rows * 16, 8 * row_bytes), steps, image(matrix, row_bytes), False)


def names(first: int, count: int) -> str:
    return "{" + ", ".join(f"%d{at}" for at in range(first, first + count)) + "}"


def program(n: int, a: Tile | None, b: Tile, size: int) -> str:
    """A comes first in the image, or from registers %d200 to %d203 that 128 threads load from buffer 2."""
    start = 1024 if a is None else 1024 + -(-len(a.image) // 1024) * 1024
    lines = [f".reg .b32 %d<{250}>;", ARRIVE.format(size=size)]
    registers = f"mov.b32 %r9, 0; mad.wide.u32 %rd12, %r0, {n * 2}, %rd1;"
    lines += [registers, *(f"mov.b32 %d{at}, 0f3F800000;" for at in range(n // 2))]  # D begins with ones
    for step in range(DEPTH // 16):
        at = (start + b.steps[step]) >> 4
        lines.append(f"mov.b64 %rd21, {b.bits | at};")
        if a is None:
            lines.append(f"mad.wide.u32 %rd13, %r0, {16 * DEPTH // 16}, %rd2;")
            lines.append(f"ld.global.v4.b32 {names(200, 4)}, [%rd13+{16 * step}];")
            left, flags = names(200, 4), f"{int(b.transposed)}"
        else:
            lines.append(f"mov.b64 %rd20, {a.bits | (1024 + a.steps[step]) >> 4};")
            left, flags = "%rd20", f"{int(a.transposed)}, {int(b.transposed)}"
        opcode = f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16"
        lines.append("wgmma.fence.sync.aligned;")
        lines.append(f"{opcode} {names(0, n // 2)}, {left}, %rd21, 1, 1, 1, {flags};")
        lines.append("wgmma.commit_group.sync.aligned;")
        if a is None:  # its registers are loaded anew
            lines.append("wgmma.wait_group.sync.aligned 0;")
    lines.append("wgmma.wait_group.sync.aligned 0;")
    lines += [f"st.global.b32 [%rd12+{4 * at}], %d{at};" for at in range(n // 2)]
    return "\n".join(lines)


def random(seed: int, *shape: int) -> tuple[np.ndarray, np.ndarray]:
    """bfloat16: bits, and values."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
    return values.view(torch.uint16).numpy(), values.double().numpy()


def gather(out: np.ndarray, n: int) -> np.ndarray:
    """[64, n] from what 128 threads have in their registers (the figure of D in section 9.7.15.5.1)."""
    matrix = np.zeros((ROWS, n))
    for thread, registers in enumerate(out.reshape(128, n // 2)):
        for at, value in enumerate(registers):
            row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (at // 2 % 2)
            matrix[row, 8 * (at // 4) + 2 * (thread % 4) + at % 2] = value
    return matrix


@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("row_bytes", [16, 32, 64, 128])
def test_products_of_tiles(row_bytes, transposed):
    n = 64
    (a_bits, a_values), (b_bits, b_values) = random(1, ROWS, DEPTH), random(2, n, DEPTH)
    a, b = tile(a_bits, row_bytes, transposed[0]), tile(b_bits, row_bytes, transposed[1])
    data = np.concatenate([a.image, b.image])
    out = np.zeros(128 * n // 2, np.float32)
    _, out = run(program(n, a, b, len(data)), data, out, num_warps=4, shared_bytes=1024 + len(data))
    assert np.abs(gather(out, n) - (1 + a_values @ b_values.T)).max() < 1e-5


@pytest.mark.parametrize("n", [8, 24, 128, 256])
def test_a_from_registers(n):
    (a_bits, a_values), (b_bits, b_values) = random(3, ROWS, DEPTH), random(4, n, DEPTH)
    b = tile(b_bits, 128, False)
    fragments = np.zeros((128, DEPTH // 16, 4, 2), np.uint16)  # the figure of A: as of mma.m16n8k16
    for thread in range(128):
        for register in range(4):
            row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (register % 2)
            for step in range(DEPTH // 16):
                column = 16 * step + 2 * (thread % 4) + 8 * (register // 2)
                fragments[thread, step, register] = a_bits[row, column : column + 2]
    out = np.zeros(128 * n // 2, np.float32)
    text = program(n, None, b, len(b.image))
    done = run(text, b.image, out, fragments, num_warps=4, shared_bytes=1024 + len(b.image))[1]
    assert np.abs(gather(done, n) - (1 + a_values @ b_values.T)).max() < 1e-5


def test_a_product_need_not_add():
    """Then D's registers need no value before."""
    b_bits, b_values = random(5, 8, DEPTH)
    tiles = tile(random(6, ROWS, DEPTH)[0], 128, False), tile(b_bits, 128, False)
    data = np.concatenate([each.image for each in tiles])
    text = program(8, *tiles, len(data)).replace("1, 1, 1, 0, 0;", "0, 1, 1, 0, 0;")
    text = "\n".join(line for line in text.split("\n") if "0f3F800000" not in line)
    out = np.zeros(128 * 4, np.float32)
    out = run(text, data, out, num_warps=4, shared_bytes=1024 + len(data))[1]
    a_values = random(6, ROWS, DEPTH)[1]
    assert np.abs(gather(out, 8) - a_values[:, 48:] @ b_values[:, 48:].T).max() < 1e-5  # the last product's


# Faults: A in registers, B of 8 columns in shared memory

SETUP = """
    .reg .b32 %d<12>; mov.b32 %r8, 1; setp.lt.s32 %p1, %r0, 32; setp.lt.s32 %p4, %r0, 128;
    mad.wide.u32 %rd10, %r0, 4, %rd0; mov.b64 %rd21, 4611686293305294848; mov.b64 %rd22, 4611686293305294850;
    mov.b32 %d0, 0; mov.b32 %d1, 0; mov.b32 %d2, 0; mov.b32 %d3, 0; mov.b32 %d4, 0; mov.b32 %d5, 0; mov.b32 %d6, 0;
    mov.b32 %d7, 0; shl.b32 %r1, %r0, 2; st.shared.b32 [%r1], %r8; add.s32 %r2, %r1, 512; st.shared.b32 [%r2], %r8;
"""  # bytes 0 to 1024 are written; %rd21: B there, swizzled by 128 bytes; %rd22: the next columns
SHARED_FENCE = "fence.proxy.async.shared::cta; bar.sync 0;"
FENCE = "wgmma.fence.sync.aligned;"
PRODUCT = (
    "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%d0, %d1, %d2, %d3}, {%d4, %d5, %d6, %d7}, %rd21, 1, 1, 1, 0;"
)
COMMIT = "wgmma.commit_group.sync.aligned;"
WAIT = "wgmma.wait_group.sync.aligned 0;"
OUT = "st.global.b32 [%rd10], %d0;"
WRITE = "st.shared.b32 [%r1], %r0;"


PRODUCTS = f"{FENCE} {PRODUCT} {COMMIT}"
BEGIN = f"{SHARED_FENCE} {PRODUCTS}"
SWAPPED = PRODUCT.replace("{%d0, %d1", "{%d1, %d0")
EARLIER = PRODUCT.replace("%d0, %d1, %d2, %d3}", "%d8, %d9, %d10, %d11}").replace("%rd21, 1", "%rd21, 0")
CASES = [
    Case("read before the wait", "reads %d0, which a product may still write", f"{BEGIN} ? {OUT} {WAIT}", "", WAIT),
    Case("not committed", "reads %d0", f"{SHARED_FENCE} {FENCE} {PRODUCT} ? {WAIT} {OUT}", "", COMMIT),
    Case(
        "the last but one waited for",
        "reads %d0",
        f"{SHARED_FENCE} {FENCE} {EARLIER} {COMMIT} {PRODUCT} {COMMIT} ? {OUT} {WAIT}",
        "wgmma.wait_group.sync.aligned 1;",
        WAIT,
    ),
    Case("written before the wait", "%d0 was written while", f"{BEGIN} ? mov.b32 %d0, 0; {WAIT} {OUT}", "", WAIT),
    Case("A written before the wait", "%d4 was written while", f"{BEGIN} ? mov.b32 %d4, 0; {WAIT} {OUT}", "", WAIT),
    Case("no fence of registers", "no wgmma.fence", f"{SHARED_FENCE} ? {PRODUCT} {COMMIT} {WAIT} {OUT}", "", FENCE),
    Case(
        "D written behind the fence",
        "%d1 was written since the last wgmma.fence",
        f"{SHARED_FENCE} {FENCE} mov.b32 %d1, 0; ? {PRODUCT} {COMMIT} {WAIT} {OUT}",
        "",
        FENCE,
    ),
    Case(
        "A written behind the fence",
        "%d5 was written since the last wgmma.fence",
        f"{BEGIN} {WAIT} mov.b32 %d5, 0; ? {PRODUCT} {COMMIT} {WAIT} {OUT}",
        "",
        FENCE,
    ),
    Case(
        "no fence of memory",
        "reads byte 0 of shared memory asynchronously, which warp 0 stored, and no fence.proxy.async",
        f"? bar.sync 0; {FENCE} {PRODUCT} {COMMIT} {WAIT} {OUT}",
        "",
        "fence.proxy.async;",
    ),
    Case(
        "a fence before the barrier, of one warp",
        "which warp [123] stored, and no fence.proxy.async",
        f"? bar.sync 0; {FENCE} {PRODUCT} {COMMIT} {WAIT} {OUT}",
        "@%p1 fence.proxy.async;",
        "fence.proxy.async;",
    ),
    Case(
        "a fence behind the barrier, of one warp",
        "warp [123] of CTA|no fence.proxy.async",
        f"bar.sync 0; ? {FENCE} {PRODUCT} {COMMIT} {WAIT} {OUT}",
        "@%p1 fence.proxy.async;",
        "fence.proxy.async;",
    ),
    Case(
        "no barrier",
        "wrote since the last barrier|never written",
        f"fence.proxy.async; ? {PRODUCTS} {WAIT}",
        "",
        SHARED_FENCE,
    ),
    Case("a store over B", "may still read", f"{BEGIN} ? {WRITE} {WAIT} {OUT}", "", f"{WAIT} bar.sync 0;"),
    Case(
        "a store over another warp's B",
        "may still read|since the last barrier",
        f"{BEGIN} {WAIT} ? {WRITE} {OUT}",
        "",
        "bar.sync 0;",
    ),
    Case(
        "one warp alone",
        "have|has taken 0 of its group's products|different products",
        f"{SHARED_FENCE} {FENCE} ?bra $END; {PRODUCT} {COMMIT} {WAIT} {OUT} $END:",
        "@%p1 ",
        "@!%p4 ",
    ),
    Case(
        "descriptors of lanes",
        "lanes have different matrix descriptors",
        f"{SHARED_FENCE} ? mov.b64 %rd21, %rd22; {PRODUCTS} {WAIT} {OUT}",
        "setp.eq.s32 %p5, %r0, 3; @%p5",
        "",
    ),
    Case(
        "descriptors of warps",
        "different products",
        f"{SHARED_FENCE} ? mov.b64 %rd21, %rd22; {PRODUCTS} {WAIT} {OUT}",
        "@%p1",
        "",
    ),
    Case(
        "beyond shared memory",
        "out of bounds: 16 bytes of shared memory",
        f"{SHARED_FENCE} ? {PRODUCTS} {WAIT} {OUT}",
        "add.s64 %rd21, %rd21, 64;",
        "",
    ),
    Case(
        "another shape over sums under way",
        "another shape",
        f"{BEGIN} ? {SWAPPED}{COMMIT} {WAIT} {OUT}",
        "",
        f"{WAIT} {FENCE}",
    ),
]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_fault_is_reported(case, seed):
    case.check(SETUP, np.zeros(128, np.int32), num_warps=4, shared_bytes=1024, seed=seed)
