"""Predicts the time of a decode step on an H100 from its bytes and its machine code, to compare with a measurement.

A kernel takes the longer of two times: that of its bytes from memory, at the bandwidth that reading reaches, and that
of its programs' loads through the L2 cache, at the cache's bandwidth. Before that come latencies that no other work
hides: the boundary between two kernels, a chain of dependent loads, and a program's instructions before its first
matrix product. If the programs do not all fit on the device at once, the last two repeat. The bytes that a kernel
requests before it waits for the previous kernel (with dependent launch) arrive during these latencies:

    latency = NODE + (TRIP * TRIPS + ISSUE * instructions of a warp) * max(1, programs / programs at once)
    time = max(early bytes / READ, latency) + max(other bytes / READ, other loaded bytes / L2)

A few-token linear takes at least

    latency + instructions of its loops / (RATE * SCHEDULERS * CLOCK)     of the SM that has most (offline/unpacking.py)

because the loops need the results of the previous kernel. The bytes arrive during the loops. With bfloat16 weights this
time is shorter than the time above. RATE, the number of instructions that a warp scheduler issues in a cycle, was not
measured; it is at most 1.

The constants were measured on an H100 on 2026-11-26: reading alone (lm_head of one token reads 622 MB in 199 us),
repeated reads of the same bytes from the L2 cache (lm_head of 16 tokens loaded 1,927 MB in 388 us when each program
read all tokens again), and a chain of small kernels in a graph. TRIP follows from kernels that move hardly any bytes:
combine took 1.9 to 2.7 us, and decode_attention, when it had four dependent loads and stores, 4.9 to 5.8 us. ISSUE is
five cycles of 1.755 GHz: the latency of an instruction if a scheduler has two warps that each wait for their own
results.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenkern import Config
from qwenkern.benchmarks.ops.cases import CASES, Case, Size
from qwenkern.benchmarks.ops.inputs import DENSE
from qwenkern.checkpoint.formats import form_of

COMPILED = Path(__file__).parents[1] / "results" / "compiled" / "sm_90.json"
PAPER, READ, L2 = 3.35e12, 3.05e12, 4.9e12  # bytes/s of an H100: its data sheet, reading from memory, from the L2 cache
MULTIPROCESSORS = 132
NODE = 0.76e-6  # seconds from a kernel to the next one, with dependent launch
TORCH_NODE = 1.8e-6  # seconds for a torch kernel of a few bytes in a graph: 12 took 21.5 us
TRIP = 0.6e-6  # seconds for a load from memory and the instructions that depend on it
RATE = 1.0
LAYER = ("qkv_rope", "decode_attention", "o_proj", "gate_up", "down")
STEP = (*LAYER, "lm_head_top_k")
WEIGHTS = ("int4", "int8", "q4_k")  # formats of whole models that have a plan; with int4 the head has int8
ISSUE = 5 / 1.755e9  # seconds for an instruction of a warp, if the SM has few warps
TRIPS = 2  # of a kernel, after its wait: the load of the previous kernel's results; the store at the end
TORCH_NODES = 12  # of a greedy step: slots, embedding, ids, positions, lengths, the check, the copy to the host
# sequences, cached tokens of each, the target as a share of the tokens per second at the data sheet's bandwidth
TARGETS = ((1, 1024, 0.85), (1, 32768, 0.80), (16, 1024, 0.75))


@dataclass(frozen=True)
class Part:
    """All launches of one op in a step. Bytes and seconds are those of all of them."""

    op: str
    launches: int
    bytes: int = 0  # from memory
    loaded: int = 0  # through the L2 cache
    early: int = 0  # the part of the bytes from memory that is requested before the wait
    issue: float = 0.0  # seconds to issue the instructions that unpack weights
    latency: float = 0.0  # before the first of the other bytes
    seconds: float = 0.0


def formats(quantize: str) -> dict[str, str]:
    """The format of the weights of each op of a step, in a model that is quantised in this way."""
    return {
        name: DENSE if name == "decode_attention" else form_of("lm_head" if name == STEP[-1] else "layers", quantize)
        for name in STEP
    }


def step(
    config: Config,
    sequences: int,
    context: int,
    compiled: list[dict[str, Any]],
    quantize: str = DENSE,
    rate: float = RATE,
) -> list[Part]:
    """The ops of one step. ``compiled`` has the kernels of the compile report, with their traffic. Raises ValueError if
    there are none for this ``quantize``."""
    cases = {case.name: case for case in CASES}
    parts = []
    for name, form in formats(quantize).items():
        chosen = {"case": name, "tokens": sequences, "weights": form, "pages": DENSE}
        kernels = [row for row in compiled if chosen.items() <= ({"weights": DENSE, "pages": DENSE} | row).items()]
        if not kernels:
            raise ValueError(f"the compile report has no {name} of {sequences} tokens with weights in {form}")
        times = config.num_hidden_layers if name in LAYER else 1
        parts.append(part(name, times, kernels, cases[name], config, Size(sequences, context, weights=form), rate))
    return [*parts, Part("torch's kernels", TORCH_NODES, seconds=TORCH_NODES * TORCH_NODE)]


def part(
    op: str, times: int, kernels: list[dict[str, Any]], case: Case, config: Config, size: Size, rate: float = RATE
) -> Part:
    """The launches of one op. Only its first kernel reads bytes from memory; the op's other kernels load what the first
    one has written."""
    moved = case.bytes_moved(config, size)
    counted = case.bytes_moved(config, Size(size.tokens, weights=size.weights))  # at the report's context
    first, *others = kernels
    at_once = min(1.0, MULTIPROCESSORS * first["occupancy"] / math.prod(first["grid"]))  # programs that begin early
    loaded, early = first["loaded"] * moved // counted, min(moved, int(first["early"] * at_once))
    latencies = [latency(row) for row in kernels]
    issue = (first.get("issue_seconds") or 0.0) / rate
    seconds = max(early / READ, latencies[0]) + max((moved - early) / READ, max(0, loaded - early) / L2)
    seconds = max(seconds, latencies[0] + issue)
    seconds += sum(latencies[1:]) + sum(row["loaded"] for row in others) / L2
    return Part(
        op,
        times * len(kernels),
        times * moved,
        times * (loaded + sum(row["loaded"] for row in others)),
        times * early,
        times * issue,
        times * sum(latencies),
        times * seconds,
    )


def latency(row: dict[str, Any]) -> float:
    """Seconds until the first matrix product of a kernel, if its weights have arrived by then."""
    turns = max(1.0, math.prod(row["grid"]) / (MULTIPROCESSORS * row["occupancy"]))
    return NODE + turns * (TRIP * TRIPS + ISSUE * row["prologue"])


def tokens_per_second(parts: list[Part], sequences: int) -> float:
    return sequences / sum(each.seconds for each in parts)


def on_paper(parts: list[Part], sequences: int) -> float:
    """Tokens per second if a step did nothing but move its bytes at the data sheet's bandwidth."""
    return sequences * PAPER / sum(each.bytes for each in parts)


def load() -> list[dict[str, Any]]:
    rows = json.loads(COMPILED.read_text(encoding="utf-8"))["kernels"]
    return [row for row in rows if row["model"] == "qwen2.5-3b"]
