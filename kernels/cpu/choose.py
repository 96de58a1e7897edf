"""What is fastest on this processor, measured once and remembered beside the compiled functions.

Products: pairs of bfloat16 are twice as fast as float32 on one maker's processors and half as fast on another's, and
torch may have a matrix unit that beats both. Weights: some processors fetch far enough ahead by themselves, others
must be asked. All of it is timed in turns, the best of several readings each, on the ops themselves.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F

from .call import Call

ROUNDS = 5
AHEAD = (0, 4096, 8192)  # bytes that weights are asked for before they are needed
WEIGHTS = 512 << 20  # bytes, more than caches hold
CLEARLY = 1.1  # how many times as fast as ours torch must be to run in our place
Key = TypeVar("Key")


@dataclass(frozen=True)
class Choice:
    products: str  # "pairs" or "floats": how common.h is compiled
    beats_torch: bool  # at products of many tokens
    ahead: int


def measure(variants: Mapping[str, ctypes.CDLL]) -> Choice:
    """The fastest of the variants that compiled, by name, and how it is best used."""
    x, w = torch.ones(128, 1024, dtype=torch.bfloat16), torch.ones(4096, 1024, dtype=torch.bfloat16)
    ways: dict[str, Callable[[], object]] = {name: _linear(each, x, w) for name, each in variants.items()}
    best = _fastest(ways | {"torch": lambda: F.linear(x, w)})
    products = min(variants, key=best.__getitem__)
    chosen = variants[products]
    rows = torch.ones(WEIGHTS // 2048, 1024, dtype=torch.bfloat16)
    read = _linear(chosen, x[:1], rows)

    def reading(ahead: int) -> Callable[[], object]:
        def run() -> None:
            ctypes.c_long.in_dll(chosen, "ahead").value = ahead
            read()

        return run

    seconds = _fastest({ahead: reading(ahead) for ahead in AHEAD})
    ahead = min(AHEAD, key=seconds.__getitem__)
    return Choice(
        products,
        beats_torch=best[products] <= CLEARLY * best["torch"],
        ahead=ahead if seconds[ahead] < 0.97 * seconds[0] else 0,
    )


def _linear(library: ctypes.CDLL, x: torch.Tensor, w: torch.Tensor) -> Callable[[], object]:
    """x times w transposed; what it works on stays alive with it."""
    (tokens, k), n, threads = x.shape, len(w), torch.get_num_threads()
    out, rows = x.new_empty(tokens, n), torch.empty(rows_size(library, tokens, k, threads))
    tensors = (out, None, rows, x, None, None, w)
    call = Call.of("few_tokens" if tokens == 1 else "many_tokens", tensors, (tokens, n, k, k, 0, k, 0, 0))

    def run(tensors: object = tensors) -> None:
        library.run(ctypes.byref(call), 1, threads)

    return run


def rows_size(library: ctypes.CDLL, tokens: int, k: int, threads: int) -> int:
    """float32 values of scratch memory that the linears ask for."""
    columns, chunk = (ctypes.c_long.in_dll(library, name).value for name in ("block_columns", "chunk"))
    return tokens * k + threads * (tokens + chunk) * columns


def _fastest(ways: Mapping[Key, Callable[[], object]]) -> dict[Key, float]:
    """Seconds of each, the best of some rounds after a first one."""
    best = dict.fromkeys(ways, float("inf"))
    for turn, (key, run) in itertools.product(range(ROUNDS + 1), ways.items()):
        started = time.perf_counter()
        run()
        if turn:
            best[key] = min(best[key], time.perf_counter() - started)
    return best


def remembered(file: Path) -> Choice | None:
    try:
        return Choice(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # not there, or of another version: measured anew
        return None


def remember(file: Path, choice: Choice) -> None:
    """Whole or not at all: another process may do the same."""
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False, encoding="utf-8") as stream:
        json.dump(asdict(choice), stream)
    os.replace(stream.name, file)
