"""Measures the limits of a device: the bandwidth, for decode steps, and the multiply-add peak, for prompts."""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from qwenkern import Config
from qwenkern.benchmarks.ops.timing import ceilings
from qwenkern.kernels import c as c_backend

BYTES = 1 << 28  # the loop reads so many: more than any cache of a processor with a few cores
ROUNDS = 4_000_000  # a round is at least a dozen vector multiply-adds of each thread; all take about 10 ms


@dataclass(frozen=True)
class Roofline:
    """Both limits of a device."""

    bandwidth: float  # bytes per second of a loop that only reads; on a GPU, of a copy
    float32: float  # operations per second; a multiply-add is two; 0: not measured
    bfloat16: float  # the same for bfloat16 products summed in float32; 0: the processor has no such instruction

    @property
    def peak(self) -> float:
        return max(self.float32, self.bfloat16)


def roofline(device: torch.device, threads: int) -> Roofline:
    """Measures in about 0.1 s. On a shared machine the limits change from minute to minute."""
    if device.type != "cpu":
        limits = ceilings(device)
        return Roofline(limits.copy, 0.0, limits.matrix)
    loops = _loops()
    if loops is None:
        return _by_torch()
    data = _data()
    read = _seconds(lambda: loops.read_memory(data.data_ptr(), BYTES, threads))
    rates = []
    for multiply_add in (loops.multiply_add, loops.multiply_add_pairs):
        operations = multiply_add(1, threads) * ROUNDS  # 0 if the processor lacks the instruction
        rates.append(operations / _seconds(functools.partial(multiply_add, ROUNDS, threads)) if operations else 0.0)
    return Roofline(BYTES / read, *rates)


def step_bytes(config: Config, weights: int, batch: int, context: int) -> int:
    """The bytes that a decode step must read: ``weights``, and a cache with two bytes per element."""
    return weights + batch * context * config.kv_bytes_per_token(2)


def prompt_operations(config: Config, batch: int, tokens: int) -> int:
    """The operations of the layers' matrix products for every token, and of lm_head for the last token of each
    sequence. Attention is not counted. It would add 3 % at 512 tokens of the 0.5B size."""
    head = config.vocab_size * config.hidden_size
    layers = config.num_parameters - (head if config.tie_word_embeddings else 2 * head)
    return 2 * batch * (layers * tokens + head)


def _loops() -> ctypes.CDLL | None:
    """The loops of kernels/c/ceilings.c, compiled for the same target as the ops; None without C."""
    library = c_backend.library()
    if library is not None:
        library.read_memory.argtypes = (ctypes.c_void_p, ctypes.c_long, ctypes.c_int)
        for multiply_add in (library.multiply_add, library.multiply_add_pairs):
            multiply_add.argtypes = (ctypes.c_long, ctypes.c_int)
        for each in (library.read_memory, library.multiply_add, library.multiply_add_pairs):
            each.restype = ctypes.c_double
    return library


@functools.cache
def _data() -> torch.Tensor:
    return torch.ones(BYTES // 8, dtype=torch.int64)


def _by_torch() -> Roofline:
    """Measures with torch. Its reduction reads almost as fast as a loop in C. Its products stay below the peak."""
    data, square = _data(), torch.randn(512, 512)
    narrow = square.bfloat16()
    rates = [2 * 512**3 / _seconds(functools.partial(torch.mm, each, each)) for each in (square, narrow)]
    return Roofline(BYTES / _seconds(data.max), *rates)


def _seconds(call: Callable[[], Any]) -> float:
    """The shortest of three readings."""
    readings = []
    for _ in range(3):
        started = time.perf_counter()
        call()
        readings.append(time.perf_counter() - started)
    return min(readings)
