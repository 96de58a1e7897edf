"""Rules for the loops that unpack quantised weights: how many instructions they may have for the bytes they read.

**Instructions that unpack** are masks, shifts and permutations of bytes (LOP3, SHF, PRMT), counted in the loop that has
the matrix products. The words of a row and a tile hold 16 pairs of values of K (kernels/weights/grouped.py). Every pair
takes a mask and, except the first pair of each word, a shift:

    4 bits   (4 + 3) / 8 instructions per weight                                                     0.875
    5 bits   the same again for the fifth bits, and four shifts of 32 values                          2.0
    6 bits   the same again for the upper bits, and eight shifts                                      2.1
    8 bits   a mask for each of two constants whose difference is the value, and a shift for          1.25
             every other pair

UNPACKING allows 0.25 to 0.4 more, for addresses and the epilogue. A sub-scale is taken out of a word with two
instructions. If x is streamed through shared memory, each pair of a token's values is packed for every tile, and if
there is a norm, widened before.

An H100 executes 64 of these instructions per cycle on each SM. While a weight of b bits arrives from memory, there is
time for 0.6 b instructions: 2.5 with int4. So all limits leave time for other instructions.

**All instructions** of the loop have a limit on an H100, too: a warp scheduler issues one per cycle.

A program with one tile, loaded before the wait, has no loop. Its instructions for x and for addresses cannot be
separated from those for each weight, so it is not judged. The same format is judged in ops whose programs loop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qwenkern.benchmarks.offline.machine_code import DEVICES, Code, Launch, Tile
from qwenkern.kernels.weights.group_products import GroupNumbers

UNPACKING = {4: 1.25, 5: 2.25, 6: 2.5, 8: 1.6}  # instructions per weight, by the bits of a code
OF_FP8 = 1.6  # at most six for four codes: the signs, and for each pair a shift and a mask to bfloat16's places
SUB_SCALE = 2.0  # for each sub-scale
X, NORM = 0.5, 1.0  # for each value of x that is streamed, and in addition if it is normalised
JUDGED = "sm_90"  # the architecture on which the time to issue has a limit
WARP, SCHEDULERS, CLOCK, READ = 32, 4, 1.755e9, 3.05e12  # of an H100: Hz, and bytes/s of reading
# For one token, reading the packed bytes should take longest. For 16 tokens, a loop adds many sums for each group, but
# should still be much faster than a loop that reads bfloat16.
MOST_ISSUED, MOST_OF_DENSE = 1.1, 0.7


@dataclass(frozen=True)
class Unpacking:
    """The unpacking of one launch."""

    a_weight: float  # instructions that unpack
    limit: float
    issued: float  # on an H100: seconds to issue a loop iteration's instructions / seconds in which its bytes arrive


def unpacking(tile: Tile, code: Code, weight_bytes: float) -> Unpacking:
    """The cost per weight of a loop over such tiles of quantised weights, if a weight takes ``weight_bytes`` bytes."""
    assert tile.form is not None
    form, weights = tile.form, tile.rows * tile.depth
    limit = UNPACKING[form.bits] if isinstance(form, GroupNumbers) else OF_FP8
    if isinstance(form, GroupNumbers) and form.has_sub_scales:
        limit += SUB_SCALE * (1 + form.has_offset) / form.group
    limit += (X + NORM * tile.has_norm) * tile.tokens / tile.rows * tile.streams_x
    cycles = code.turn * code.warps / SCHEDULERS
    arrival = weights * weight_bytes / READ * DEVICES[JUDGED].num_sms * CLOCK
    return Unpacking(code.unpacking * WARP * code.warps / weights, limit, cycles / arrival)


def seconds_to_issue(launch: Launch, code: Code, shape: Sequence[int]) -> float:
    """For a few-token linear over a weight of this shape: the least time in which the busiest SM of an H100 issues the
    instructions of its loops."""
    assert launch.tile is not None
    tile, (rows, columns), sms = launch.tile, shape, DEVICES[JUDGED].num_sms
    programs, splits = (*launch.grid, 1)[:2]
    blocks = math.ceil(math.ceil(columns / tile.depth) / splits)
    turns = math.ceil(math.ceil(rows / tile.rows) / programs) * blocks * math.ceil(programs * splits / sms)
    return turns * code.turn * code.warps / SCHEDULERS / CLOCK


def broken_rules(key: str, found: Unpacking, tokens: int, weight_bytes: float) -> list[str]:
    """The rules of this file that a launch breaks, as text."""
    broken = []
    if found.a_weight > found.limit:
        broken.append(f"{found.a_weight:.2f} instructions a weight unpack it, and {found.limit:.2f} may")
    most = MOST_ISSUED if tokens == 1 else MOST_OF_DENSE * 2 / weight_bytes
    if key == JUDGED and found.issued > most:
        broken.append(f"its instructions take {found.issued:.2f} times as long as its bytes, and {most:.2f} may")
    return broken
