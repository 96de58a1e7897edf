"""The shared part of the linear kernels for few tokens (1 to 16). A decode step spends most of its time in these
kernels, on reading weights.

The kernels compute x [T, K] times weight [N, K] transposed. A tile has BLOCK_N rows of the weight, which are multiplied
with all tokens. Two designs differ in where x is kept:

    resident   K fits one block. A program normalises x once, keeps x in registers, and reads tile after tile.
    streamed   A program has one tile, and reads the tile and x by blocks along K. SPLIT_K programs may share a tile.

    weight [N, K]      K ───────────────►            x [T, K]: read by every program, from the L2 cache
      program 0  ▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓                 ▓ is loaded before the previous kernel has ended
      program 1  ▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓
      program 0  ░░░░░░░░░░░░░░░░░░░░                 resident: ░ is the next tile of the program
      program 1  ░░░░░░░░░░░░░░░░░░░░

Weights do not depend on earlier kernels. So with dependent launch a program loads its first tile (streamed: the first
AHEAD values of each row) into shared memory before it waits for the earlier kernels, and the memory stays busy while
they end. On an H100 this reduces a decode step of Qwen2.5-3B from 2.6 to 2.4 ms.

The weight is the left operand of the tensor cores, so a single token needs a single column. Warps divide a tile along
K, as a batch of products whose sums are added at the end. They do not divide it along N, where a tile may have only 16
rows: each warp would compute the whole product and issue several times as many dependent instructions. BLOCK_N stays
below 64, because from 64 rows on Hopper uses another instruction (wgmma), which sums in another order. Below 64 the
products are batch-invariant.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..language import block_of, cast, launch_dependents, round_to, wait

MAX_TOKENS = 16  # for more tokens, torch's matrix product is as fast
MAX_HIDDEN = 32768  # the norm keeps a row in a program's registers
ROWS_AT_ONCE = tl.constexpr(16384)  # values of x that a streaming program loads at once for the norm


@triton.jit
def _normalised(x, scales, norm_weight):
    """x in float32, times the scale of each token and the weight of the norm, rounded as rms_norm does. The result has
    the norm's dtype."""
    dtype: tl.constexpr = norm_weight.dtype
    return cast(round_to(x * scales, dtype) * norm_weight.to(tl.float32), dtype)


@triton.jit
def _scales(x_ptr, num_tokens, tokens, k_size, x_stride, eps, BLOCK_T: tl.constexpr, BLOCK_ROW: tl.constexpr):
    """1 / sqrt(mean(x^2) + eps) of each token: [BLOCK_T]. Several rows are loaded at once. All threads lie along a row,
    so the order of its sum does not depend on the number of rows."""
    ROWS: tl.constexpr = min(BLOCK_T, max(1, ROWS_AT_ONCE // BLOCK_ROW))
    k = tl.arange(0, BLOCK_ROW)[None, :]
    scales = tl.zeros([BLOCK_T], tl.float32)
    for start in range(0, num_tokens, ROWS):
        row = start + tl.arange(0, ROWS)
        at = tl.minimum(row, num_tokens - 1)[:, None] * x_stride + k
        x = tl.load(x_ptr + at, mask=k < k_size, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x, axis=1) / k_size + eps)
        scales += tl.sum(tl.where(tokens[:, None] == row[None, :], scale[None, :], 0.0), axis=1)
    return scales


@triton.jit
def reads_nothing(args, tile, tokens, num_tokens, BLOCK_N: tl.constexpr):
    """BEFORE for an epilogue that needs only the products."""
    return (tokens,)


@triton.jit
def multiply(
    args,  # for the op's own functions
    x_ptr,  # [T, K]
    norm_weight_ptr,  # [K], or None: no norm
    weight,  # [N, K], the named tuple of its format
    parts_ptr,  # [SPLIT_K, tiles, BLOCK_N, BLOCK_T] float32, or None
    arrivals_ptr,  # [tiles] int32, zero before and after the kernel; or None
    num_tokens,
    num_tiles,
    k_size,
    x_stride,
    eps,
    LOAD: tl.constexpr,  # this and the next five are of the weight's format
    LOAD_GROUPS: tl.constexpr,
    OPERAND: tl.constexpr,
    MULTIPLY: tl.constexpr,
    PREFETCH: tl.constexpr,
    FORM: tl.constexpr,
    ROWS: tl.constexpr,  # (args, tile, places in the tile, BLOCK_N) -> their rows, int64, all within the weight
    BEFORE: tl.constexpr,  # (args, tile, tokens, num_tokens, BLOCK_N) -> what the epilogue reads from memory
    EPILOGUE: tl.constexpr,  # (args, tile, products [BLOCK_N, BLOCK_T], what BEFORE returned, tokens, num_tokens)
    BLOCK_T: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    AHEAD: tl.constexpr,
    SPLIT_K: tl.constexpr,
    SLICES: tl.constexpr,  # of a block along K, one a warp
    EVEN_K: tl.constexpr,
    RESIDENT: tl.constexpr,
    LOOPS: tl.constexpr,  # a program has several tiles
    PREFETCH_LINES: tl.constexpr,
    STAGES: tl.constexpr,  # pipeline stages of all loads in a loop; None: num_stages, and only operands of products
    PDL: tl.constexpr,
):
    """Multiplies the rows of the program's tiles with all tokens, and runs the epilogue of each tile. The epilogue must
    ignore the products' columns beyond the last token."""
    launch_dependents(PDL)
    first = tl.program_id(0)
    tokens = tl.arange(0, BLOCK_T)
    zeros = tl.zeros([SLICES, BLOCK_N, BLOCK_T], tl.float32)
    # Scales and zero points of groups that are too small for an asynchronous copy are loaded into registers, one
    # iteration earlier.
    CARRIED: tl.constexpr = FORM is not None and not FORM.has_sub_scales
    if RESIDENT:
        tl.static_assert(SPLIT_K == 1)
        step = tl.num_programs(0)
        if AHEAD > 0:
            early = LOAD(weight, ROWS, args, first, 0, k_size, FORM, BLOCK_N, BLOCK_K, SLICES, EVEN_K)
            early_groups = LOAD_GROUPS(weight, ROWS, args, first, 0, k_size, FORM, BLOCK_N, BLOCK_K, SLICES, EVEN_K)
        elif FORM is not None:  # packed weights go into the L2 cache, because their first tile would take registers
            PREFETCH(weight, ROWS, args, first, 0, k_size, FORM, BLOCK_N, PREFETCH_LINES)
        if LOOPS and PREFETCH_LINES > 0 and first + step < num_tiles:
            PREFETCH(weight, ROWS, args, first + step, 0, k_size, FORM, BLOCK_N, PREFETCH_LINES)
        wait(PDL)
        if AHEAD > 0:
            inputs = BEFORE(args, first, tokens, num_tokens, BLOCK_N)
        x = _resident_x(
            x_ptr, norm_weight_ptr, tokens, num_tokens, k_size, x_stride, eps, BLOCK_T, BLOCK_K, SLICES, EVEN_K
        )
        x = OPERAND(x, FORM)
        if LOOPS or AHEAD == 0:
            second = tl.minimum(first + (step if AHEAD > 0 else 0), num_tiles - 1)
            groups = LOAD_GROUPS(weight, ROWS, args, second, 0, k_size, FORM, BLOCK_N, BLOCK_K, SLICES, EVEN_K)
            for tile in tl.range(first + (step if AHEAD > 0 else 0), num_tiles, step, num_stages=STAGES):
                after = tl.minimum(tile + step, num_tiles - 1)
                now = after if CARRIED else tile
                next_groups = LOAD_GROUPS(weight, ROWS, args, now, 0, k_size, FORM, BLOCK_N, BLOCK_K, SLICES, EVEN_K)
                piece = LOAD(weight, ROWS, args, tile, 0, k_size, FORM, BLOCK_N, BLOCK_K, SLICES, EVEN_K)
                products = tl.sum(MULTIPLY(piece, groups if CARRIED else next_groups, x, zeros, FORM), axis=0)
                groups = next_groups
                EPILOGUE(args, tile, products, BEFORE(args, tile, tokens, num_tokens, BLOCK_N), tokens, num_tokens)
        if AHEAD > 0:
            products = tl.sum(MULTIPLY(early, early_groups, x, zeros, FORM), axis=0)
            EPILOGUE(args, first, products, inputs, tokens, num_tokens)
    else:
        split = tl.program_id(1)
        k_per_split = tl.cdiv(tl.cdiv(k_size, BLOCK_K), SPLIT_K) * BLOCK_K
        k_start = split * k_per_split
        k_end = tl.minimum(k_size, k_start + k_per_split)
        if AHEAD > 0:
            early = LOAD(weight, ROWS, args, first, k_start, k_end, FORM, BLOCK_N, AHEAD, SLICES, True)
            early_groups = LOAD_GROUPS(weight, ROWS, args, first, k_start, k_end, FORM, BLOCK_N, AHEAD, SLICES, True)
        at = k_start + AHEAD
        if EVEN_K:  # there is no mask, so stay within a split that has only one block
            at = tl.minimum(at, k_end - BLOCK_K)
        groups = LOAD_GROUPS(weight, ROWS, args, first, at, k_end, FORM, BLOCK_N, BLOCK_K, SLICES, EVEN_K)
        PREFETCH(weight, ROWS, args, first, k_start + AHEAD, k_end, FORM, BLOCK_N, PREFETCH_LINES)
        wait(PDL)
        inputs = BEFORE(args, first, tokens, num_tokens, BLOCK_N)
        scales = tl.zeros([BLOCK_T], tl.float32)
        if norm_weight_ptr is not None:
            scales = _scales(x_ptr, num_tokens, tokens, k_size, x_stride, eps, BLOCK_T, BLOCK_ROW)
        acc = zeros
        # The columns beyond the last token read the last token again.
        x_rows = x_ptr + tl.minimum(tokens, num_tokens - 1)[None, :, None] * x_stride
        for start in tl.range(k_start + AHEAD, k_end, BLOCK_K, num_stages=STAGES):
            k = start + block_of(BLOCK_K, SLICES)
            mask = None if EVEN_K else k < k_end
            other = None if EVEN_K else 0.0
            after = tl.minimum(start + BLOCK_K, k_end - BLOCK_K) if EVEN_K else start + BLOCK_K
            next_groups = LOAD_GROUPS(weight, ROWS, args, first, after, k_end, FORM, BLOCK_N, BLOCK_K, SLICES, EVEN_K)
            piece = LOAD(weight, ROWS, args, first, start, k_end, FORM, BLOCK_N, BLOCK_K, SLICES, EVEN_K)
            if FORM is None:
                x = tl.load(x_rows + k, mask=mask, other=other)
            else:
                x = _load_x(x_ptr, tokens, num_tokens, x_stride, start, k_end, BLOCK_K, SLICES, EVEN_K)
            x = OPERAND(_streamed_x(x, norm_weight_ptr, scales, k, mask, other), FORM)
            acc = MULTIPLY(piece, groups, x, acc, FORM)
            groups = next_groups
        if AHEAD > 0:
            k = k_start + block_of(AHEAD, SLICES)
            x = tl.load(x_rows + k)
            x = OPERAND(_streamed_x(x, norm_weight_ptr, scales, k, None, None), FORM)
            acc = MULTIPLY(early, early_groups, x, acc, FORM)
        products = tl.sum(acc, axis=0)
        last = True
        if SPLIT_K > 1:
            at = tl.arange(0, BLOCK_N)[:, None] * BLOCK_T + tl.arange(0, BLOCK_T)[None, :]
            part = num_tiles * BLOCK_N * BLOCK_T
            parts = parts_ptr + first * BLOCK_N * BLOCK_T + at
            tl.store(parts + split * part, products)
            tl.debug_barrier()  # all threads have written their partial sums before one counts the arrival
            last = tl.atomic_add(arrivals_ptr + first, 1, sem="acq_rel") == SPLIT_K - 1
        if last:
            if SPLIT_K > 1:
                products = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
                for other_split in range(SPLIT_K):
                    products += tl.load(parts + other_split * part, cache_modifier=".cg")
                tl.store(arrivals_ptr + first, 0)
            EPILOGUE(args, first, products, inputs, tokens, num_tokens)


@triton.jit
def _resident_x(
    x_ptr,
    norm_weight_ptr,
    tokens,
    num_tokens,
    k_size,
    x_stride,
    eps,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """The tokens, normalised if there is a norm, [SLICES, BLOCK_T, BLOCK_K / SLICES]. All threads lie along a row, so
    the order of its sum does not depend on the number of tokens."""
    k = tl.arange(0, BLOCK_K)[None, :]
    mask = None if EVEN_K else k < k_size
    other = None if EVEN_K else 0.0
    x = tl.load(x_ptr + tl.minimum(tokens, num_tokens - 1)[:, None] * x_stride + k, mask=mask, other=other)
    if norm_weight_ptr is not None:
        norm_weight = tl.load(norm_weight_ptr + k, mask=mask, other=other)
        h = x.to(tl.float32)
        scales = tl.rsqrt(tl.sum(h * h, axis=1) / k_size + eps)
        x = _normalised(h, scales[:, None], norm_weight)
    return tl.permute(tl.reshape(x, [BLOCK_T, SLICES, BLOCK_K // SLICES]), [1, 0, 2])


@triton.jit
def _load_x(
    x_ptr,
    tokens,
    num_tokens,
    x_stride,
    start,
    k_end,
    BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """A block of the tokens [SLICES, BLOCK_T, BLOCK_K / SLICES].

    Packed formats read single values of eight tokens at once. So in shared memory, 16 bytes of one token lie beside
    16 bytes of the next one: if whole rows followed each other, all eight values would lie in one bank. The tensor is
    loaded with one dimension, because Triton would choose the order of several dimensions itself."""
    CHUNK: tl.constexpr = 8
    BLOCK_T: tl.constexpr = tokens.shape[0]
    at = tl.arange(0, BLOCK_K * BLOCK_T)
    column = start + at // (CHUNK * BLOCK_T) * CHUNK + at % CHUNK
    token = tl.minimum(at // CHUNK % BLOCK_T, num_tokens - 1)
    mask = None if EVEN_K else column < k_end
    x = tl.load(x_ptr + token * x_stride + column, mask=mask, other=None if EVEN_K else 0.0)
    x = tl.reshape(x, [SLICES, BLOCK_K // SLICES // CHUNK, BLOCK_T, CHUNK])
    return tl.reshape(tl.permute(x, [0, 2, 1, 3]), [SLICES, BLOCK_T, BLOCK_K // SLICES])


@triton.jit
def _streamed_x(x, norm_weight_ptr, scales, k, mask, other):
    """A block of the tokens [SLICES, BLOCK_T, BLOCK_K / SLICES], normalised if there is a norm."""
    if norm_weight_ptr is not None:
        norm_weight = tl.load(norm_weight_ptr + k, mask=mask, other=other)
        x = _normalised(x.to(tl.float32), scales[None, :, None], norm_weight)
    return x
