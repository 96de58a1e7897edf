"""The tiles of the linear kernels for few tokens (few_tokens.py): the configuration, and the constants of launches."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..triton_if_any import INTERPRETED
from ..weights import Weight
from . import tuning
from .backend import pdl_options
from .few_tokens import MAX_TOKENS
from .launching import cdiv, next_power_of_2

RESIDENT = 4096  # the most bytes of a row of x that is kept in registers
IN_FLIGHT = 65536  # bytes of weight in flight for each program: more than a multiprocessor's bandwidth x latency


for _op in ("linear", "norm_linear", "norm_qkv_rope", "norm_swiglu_linear", "lm_head"):
    tuning.SPACES[_op] = {
        "BLOCK_N": (16, 32),  # below 64, for batch invariance
        "BLOCK_K": (128, 256, 512, 1024, 2048),
        "AHEAD": (0, 512, 1024, 2048, 4096),
        "PROGRAMS": (1, 2, 4, 8),
        "PREFETCH_LINES": (0, 8, 16, 32, 64),
        "num_warps": (2, 4, 8),
        "num_stages": (2, 3, 4, 5, 6, 8),
    } | ({"SPLIT_K": (1, 2, 3, 4, 6, 8)} if _op in ("linear", "norm_linear") else {})


PAIRED = ("norm_qkv_rope", "norm_swiglu_linear")  # ops whose tiles have rows from two places in the weight


@tuning.remember
def config(op: str, device: tuning.Device, n: int, k: int, tokens: int, itemsize: int) -> dict[str, Any]:
    """The configuration of a linear kernel over a weight [N, K].

    BLOCK_K, AHEAD, SPLIT_K and num_warps determine the order of summation. For batch invariance they do not depend on
    the number of tokens."""
    tile = 16 * next_power_of_2(k) * itemsize
    fits = itemsize == 2 and tile <= 16 * RESIDENT and 3 * tile <= device.shared_memory - 16384
    heuristic = (
        _resident(device, n, k, itemsize) if fits and k >= 128 else _streamed(op, device, n, k, tokens, itemsize)
    )
    if device.backend != "cuda" or device.capability < 90:  # no dependent launch
        heuristic["AHEAD"] = 0
    if device.backend != "cuda" or INTERPRETED:
        heuristic["PREFETCH_LINES"] = 0
    # tuned tiles are for 2-byte values; 4-byte ones would not fit
    chosen = tuning.lookup(op, device, {"n": n, "k": k}, heuristic) if itemsize == 2 else heuristic
    return _sound(chosen, heuristic, k)


def _sound(chosen: dict[str, Any], heuristic: dict[str, Any], k: int) -> dict[str, Any]:
    """The chosen configuration without fields that its design does not have. A tuned configuration may be of the other
    design, because the entry with the nearest sizes is taken."""
    block_k, split_k = chosen["BLOCK_K"], chosen["SPLIT_K"]
    if heuristic["PROGRAMS"]:  # resident
        block_k = heuristic["BLOCK_K"]
        ahead = block_k if chosen["AHEAD"] else 0
        programs = chosen["PROGRAMS"] or heuristic["PROGRAMS"]
        return chosen | {"BLOCK_K": block_k, "AHEAD": ahead, "SPLIT_K": 1, "PROGRAMS": programs}
    ahead = chosen["AHEAD"] if chosen["AHEAD"] <= _least(k, block_k, split_k) else 0
    return chosen | {"AHEAD": ahead, "PROGRAMS": 0}


def _resident(device: tuning.Device, n: int, k: int, itemsize: int) -> dict[str, Any]:
    """One block holds a whole row. A program has its first tile and two more tiles in shared memory."""
    block_k = next_power_of_2(k)
    tile = 16 * block_k * itemsize
    programs = max(1, min(4, (device.shared_memory - 16384) // (3 * tile)))
    tiles = cdiv(cdiv(n, 16), programs * device.num_sms)  # tiles of a program
    return {
        "BLOCK_N": 16,
        "BLOCK_K": block_k,
        "AHEAD": block_k,
        "SPLIT_K": 1,
        "PROGRAMS": programs,
        "PREFETCH_LINES": cdiv(block_k * itemsize, 128),
        "num_warps": max(1, min(8, block_k * itemsize // 512)),  # rows of shorter slices would lie in the same banks
        "num_stages": 3 if tiles > 2 else 1,
    }


def _streamed(op: str, device: tuning.Device, n: int, k: int, tokens: int, itemsize: int) -> dict[str, Any]:
    """A program needs at least two blocks in shared memory. Two programs share a multiprocessor if there are more
    programs than multiprocessors."""
    wide = 1024 // itemsize
    shapes = [(32, wide), (32, wide // 2)]
    if n < 64 * device.num_sms:  # with 32 rows there would be too few programs
        shapes = [(16, wide), *shapes]
    for block_n, block_k in shapes:
        programs = cdiv(n, block_n)
        splits = op in ("linear", "norm_linear")
        split_k = max(1, min(round(device.num_sms / programs), 8, k // 1024)) if splits else 1
        neighbours = min(2, cdiv(programs * split_k, device.num_sms))  # programs on one multiprocessor
        memory = device.shared_memory // neighbours - 4096
        if 2 * (block_n + MAX_TOKENS) * block_k * itemsize <= memory:
            break
    ahead = 0
    if device.backend == "cuda" and device.capability >= 90:
        ahead = 4 * block_k if neighbours == 1 else block_k
    if (block_n * ahead + 2 * (block_n + MAX_TOKENS) * block_k) * itemsize > memory:
        ahead = 0
    memory -= block_n * ahead * itemsize
    blocks = min(memory // ((block_n + tokens) * block_k * itemsize), IN_FLIGHT // (block_n * block_k * itemsize))
    return {
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "AHEAD": ahead,
        "SPLIT_K": split_k,
        "PROGRAMS": 0,  # 0: one program for each tile
        "PREFETCH_LINES": 4 * block_k * itemsize // 128,
        "num_warps": 8 if ahead > block_k and device.capability == 90 else 4,  # 8 were tried only on sm_90
        "num_stages": 1 + max(1, blocks),
    }


@tuning.remember
def packed_config(
    op: str, device: tuning.Device, n: int, k: int, tokens: int, itemsize: int, row: int, kind: type[Weight], form: Any
) -> dict[str, Any]:
    """The configuration of a linear kernel over a packed weight [N, K] whose rows take ``row`` bytes. ``itemsize`` is
    that of x, ``form`` the weight's ``triton_numbers``. The fields that determine the order of summation do not depend
    on the number of tokens."""
    heuristic = chosen = _packed(op, device, n, k, tokens, itemsize, row, kind.row_tile, form)
    if itemsize == 2:
        chosen = tuning.lookup(tuning.named(op, kind.format), device, {"n": n, "k": k}, heuristic)
    if heuristic["PROGRAMS"]:  # resident
        programs = chosen["PROGRAMS"] or heuristic["PROGRAMS"]
        chosen = chosen | {"BLOCK_K": heuristic["BLOCK_K"], "SPLIT_K": 1, "PROGRAMS": programs}
    else:
        split_k = min(chosen["SPLIT_K"], cdiv(k, chosen["BLOCK_K"]))
        blocks = cdiv(cdiv(k, chosen["BLOCK_K"]), split_k)  # blocks of a split
        chosen = chosen | {"SPLIT_K": cdiv(cdiv(k, chosen["BLOCK_K"]), blocks), "PROGRAMS": 0}  # no split is empty
    if op in PAIRED:
        chosen = chosen | {"BLOCK_N": max(chosen["BLOCK_N"], 2 * kind.row_tile)}
    chosen = chosen | {"num_warps": min(chosen["num_warps"], chosen["BLOCK_K"] // 32)}
    return chosen | {"AHEAD": _ahead(chosen, device, n, k, form) if itemsize == 2 else 0}


def _ahead(chosen: dict[str, Any], device: tuning.Device, n: int, k: int, form: Any) -> int:
    """The number of values of a packed row that a program loads before it waits for earlier kernels: one block, if
    every program has a block. A program that loops over tiles would keep the block in registers, and no second program
    would fit on its multiprocessor. Small groups have so many scales that those of a second block spill."""
    if device.backend != "cuda" or device.capability < 90 or form.step < 64:  # before 90: no dependent launch
        return 0
    block_k, split_k, programs = chosen["BLOCK_K"], chosen["SPLIT_K"], chosen["PROGRAMS"]
    if programs:
        loops = cdiv(n, chosen["BLOCK_N"]) > programs * device.num_sms
        return 0 if loops or k != block_k else block_k
    return block_k if block_k <= _least(k, block_k, split_k) else 0


def _least(k: int, block_k: int, split_k: int) -> int:
    """The number of values of K in the last split."""
    return k - (split_k - 1) * cdiv(cdiv(k, block_k), split_k) * block_k


def _packed(
    op: str, device: tuning.Device, n: int, k: int, tokens: int, itemsize: int, row: int, row_tile: int, form: Any
) -> dict[str, Any]:
    paired, on_cuda = op in PAIRED, device.backend == "cuda" and not INTERPRETED
    block_n = 32 if n % 32 == 0 or paired else 16
    memory = device.shared_memory - 8192 - 512 * block_n  # partial sums of the warps
    block_k = max(32, next_power_of_2(k))
    tile = block_n * row * block_k // k
    # With groups of 16 values, a whole row has more products than fit in registers.
    if k * itemsize <= RESIDENT and form.step >= 32 and tile + 2 * MAX_TOKENS * block_k * itemsize <= memory:
        if n < 32 * device.num_sms and not paired:  # with 32 rows there would be too few programs
            tile, block_n = tile * 16 // block_n, 16
        x = tokens * block_k * itemsize
        stages = max(2, min(3, 1 + (memory - x) // tile))
        return {
            "BLOCK_N": block_n,
            "BLOCK_K": block_k,
            "SPLIT_K": 1,
            "PROGRAMS": max(1, min(2, (memory + 8192) // ((stages - 1) * tile + x))),
            "PREFETCH_LINES": next_power_of_2(row * row_tile // 256) if on_cuda else 0,
            "num_warps": max(1, min(8, block_k // 128)),
            "num_stages": stages,
        }
    block_k = (1024 if form.step >= 32 else 512) * 2 // itemsize
    unpacked = 0 if itemsize == 2 else block_n * itemsize  # float32 values pass through shared memory
    while block_k * (2 * (block_n * row // k + 1 + MAX_TOKENS * itemsize) + unpacked) > memory or block_k >= 2 * k:
        block_k //= 2
    memory -= block_k * unpacked
    split_k = 1 if paired or op == "lm_head" else max(1, min(round(2 * device.num_sms * block_n / n), 8, k // 1024))
    neighbours = 1 if n * split_k <= device.num_sms * block_n else 2  # programs on one multiprocessor
    stages = memory // neighbours // (block_k * (block_n * row // k + 1 + tokens * itemsize))
    return {
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "SPLIT_K": split_k,
        "PROGRAMS": 0,
        "PREFETCH_LINES": next_power_of_2(row * block_k // k * row_tile // 64) if on_cuda else 0,
        # With fewer warps, groups of 16 values with an offset would spill registers.
        "num_warps": max(1, min(8, block_k // (64 if form.step < 32 and form.has_offset else 128))),
        "num_stages": 1 + max(1, min(5, stages - 1)),
    }


def padded(tokens: int, device: tuning.Device) -> int:
    """The number of columns of the products. AMD's matrix instructions need at least 16."""
    return next_power_of_2(tokens) if device.backend == "cuda" else MAX_TOKENS


def tiling(op: str, x: Tensor, weight: Weight, most_rows: int = MAX_TOKENS * 2) -> tuple[int, int, dict[str, Any]]:
    """For a kernel that calls ``multiply``: the number of tiles, the number of programs for each split, and the
    constants. A tile has at most ``most_rows`` rows."""
    num_tokens, k_size = x.shape
    device = tuning.device_of(x)
    block_t = padded(num_tokens, device)
    form = weight.triton_numbers()
    if form is not None:  # packed
        # With one column, Triton 3.7 puts the sums of all products that a warp has of a batch in the same registers,
        # which is wrong (tests/ptx/test_foreign.py has the case).
        block_t = max(2, block_t)
        row, kind = weight.nbytes // len(weight), type(weight)
        found = packed_config(op, device, len(weight), k_size, block_t, x.element_size(), row, kind, form)
    else:
        found = config(op, device, len(weight), k_size, block_t, x.element_size())
    chosen = dict(found)
    programs = chosen.pop("PROGRAMS") * device.num_sms  # 0: x is streamed, and each tile has a program
    chosen["BLOCK_N"] = min(chosen["BLOCK_N"], most_rows)
    tiles = cdiv(len(weight), chosen["BLOCK_N"])
    grid = min(tiles, programs) if programs else tiles
    constants = chosen | {
        "LOAD": weight.triton_load,
        "LOAD_GROUPS": weight.triton_load_groups,
        "OPERAND": weight.triton_operand,
        "MULTIPLY": weight.triton_multiply,
        "PREFETCH": weight.triton_prefetch,
        "FORM": form,
        "BLOCK_T": block_t,
        "BLOCK_ROW": next_power_of_2(k_size),
        "SLICES": chosen["num_warps"],
        "EVEN_K": k_size % chosen["BLOCK_K"] == 0,
        "RESIDENT": programs > 0,
        "STAGES": None if form is None else chosen["num_stages"],
        "LOOPS": grid < tiles,
        **pdl_options(x),
    }
    return tiles, grid, constants
