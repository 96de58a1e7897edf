"""Predicts the time of a decode step on an H100 from its bytes and its machine code, to compare with a measurement.

A kernel reaches the bandwidth of a copy if it has enough bytes in flight: bandwidth times latency, about 40 KB per SM.
Its bytes in flight are at most its shared memory per CTA times its CTAs per SM. A node of a CUDA graph costs NODE if
nothing overlaps it. Dependent launch can overlap it, so the prediction has two values: all nodes overlapped, and none.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenkern import Config
from qwenkern.benchmarks.ops.cases import CASES, Size

COMPILED = Path(__file__).parents[1] / "results" / "compiled" / "sm_90.json"
PAPER, COPY = 3.35e12, 3.0e12  # bytes/s of an H100: its data sheet, and a copy
MULTIPROCESSORS = 132
IN_FLIGHT = 40e3  # bytes per SM that keep the memory busy
NODE = 1.3e-6  # seconds per node of a CUDA graph
LAYER = ("qkv_rope", "decode_attention", "o_proj", "gate_up", "down")
TORCH_NODES = 9  # of a greedy step: slots (4), embedding, ids, positions, lengths, and the copy to the host
# sequences, cached tokens of each, the target as a share of the tokens per second at the data sheet's bandwidth
TARGETS = ((1, 1024, 0.85), (1, 32768, 0.80), (16, 1024, 0.75))


@dataclass(frozen=True)
class Part:
    """All launches of one op in a step."""

    op: str
    launches: int
    bytes: int
    in_flight: float | None  # bytes per SM that its first kernel has requested, at most
    seconds: float


def step(config: Config, sequences: int, context: int, compiled: list[dict[str, Any]]) -> list[Part]:
    """The ops of one step. ``compiled`` are the kernels of the compile report."""
    cases = {case.name: case for case in CASES}
    parts = []
    for name in (*LAYER, "lm_head_top_k"):
        times = config.num_hidden_layers if name in LAYER else 1
        kernels = [row for row in compiled if row["case"] == name and row["tokens"] == sequences]
        programs = math.prod(kernels[0]["grid"]) / MULTIPROCESSORS
        in_flight = min(kernels[0]["occupancy"], max(1.0, programs)) * kernels[0]["code"]["shared"]
        moved = cases[name].bytes_moved(config, Size(sequences, context))
        seconds = moved / COPY / min(1.0, in_flight / IN_FLIGHT)
        parts.append(Part(name, times * len(kernels), times * moved, in_flight, times * seconds))
    return [*parts, Part("torch's nodes", TORCH_NODES, 0, None, 0.0)]


def tokens_per_second(parts: list[Part], sequences: int, hidden: bool) -> float:
    launches = 0 if hidden else sum(part.launches for part in parts)
    return sequences / (sum(part.seconds for part in parts) + launches * NODE)


def on_paper(parts: list[Part], sequences: int) -> float:
    """Tokens per second if a step only moved its bytes, at the data sheet's bandwidth."""
    return sequences * PAPER / sum(part.bytes for part in parts)


def load() -> list[dict[str, Any]]:
    rows = json.loads(COMPILED.read_text(encoding="utf-8"))["kernels"]
    return [row for row in rows if row["model"] == "qwen2.5-3b"]
