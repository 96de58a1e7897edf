"""Measures what is fastest on this processor while C is prepared. All measurements together take about a second.

Products: pairs of bfloat16 are twice as fast as float32 on one maker's processors and half as fast on another's. torch
may use a matrix unit that is faster than both. Weights: some processors prefetch far enough in advance by themselves,
and others need prefetch instructions. The measurements run the C functions alternately, and count the processor time of
one thread, so other programs disturb them little. A choice is kept for later processes only if both halves of the
readings lead to it. The date and the load average of the measurement are kept with the choice."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import logging
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import _disable_current_modes

from ..weights import FORMATS, Dense, Weight
from . import kept, threads
from .calls import Call, make
from .compiler import digest
from .limits import linear_scratch
from .targets import processor
from .weights import NO_WEIGHT, weight_struct

if TYPE_CHECKING:
    from .build import Loaded

logger = logging.getLogger(__name__)

SECONDS = 0.15  # the time for more rounds after the first ROUNDS
ROUNDS = 4  # the smallest number of rounds: two in each half
TOKENS = 128
DISTANCES = (0, 4096, 16384)  # bytes in advance that weights are prefetched
GROUPED_DISTANCES = (0, 1024, 4096)  # the same for quantised weights, whose codes are one stream of memory
WEIGHTS = 128 << 20  # bytes, more than the caches of most processors
CLEARLY = 1.1  # torch multiplies many tokens if it is more than 1.1 times as fast as C
NEARLY = 0.97  # a shorter distance is preferred if it reaches this share of the best speed
_renewing = False
measured: dict[str, str] = {}  # by question: the date and load of the measurement in use
QUESTIONS = {
    "products": "which library multiplies faster",
    "many tokens": "what multiplies many tokens",
    "prefetch": "how many bytes in advance weights are prefetched",
    "prefetch 4 bits": "how many bytes in advance codes of 4 to 6 bits are prefetched",
    "prefetch 8 bits": "how many bytes in advance codes of 8 bits are prefetched",
}


def products(rivals: Mapping[str, Loaded]) -> str:
    """The name of the target whose library multiplies fastest."""

    def ways() -> dict[str, Callable[[], object]]:
        x, w = _ones(TOKENS, 1024), _ones(2048, 1024)
        return {name: _linear(each, x, Dense(w)) for name, each in rivals.items()}

    return _choice("products", list(rivals), ways, _fastest)


def multiplies(loaded: Loaded) -> bool:
    """Whether C multiplies many tokens at least about as fast as torch (see CLEARLY)."""
    target = loaded.target.name

    def ways() -> dict[str, Callable[[], object]]:
        x, w = _ones(TOKENS, 1024), _ones(2048, 1024)
        return {target: _linear(loaded, x, Dense(w)), "torch": lambda: F.linear(x, w)}

    def rule(seconds: Mapping[str, float]) -> str:
        return target if seconds[target] <= CLEARLY * seconds["torch"] else "torch"

    return _choice("many tokens", [target, "torch"], ways, rule) == target


def prefetch(loaded: Loaded) -> int:
    """The best prefetch distance of dense weights, in bytes."""

    def ways() -> dict[int, Callable[[], object]]:
        x, w = _ones(1, 1024), Dense(_ones(WEIGHTS // 2048, 1024))
        return {distance: _linear(loaded, x, w, distance) for distance in DISTANCES}

    return _choice("prefetch", list(DISTANCES), ways, _shortest, loaded.target.name)


def prefetch_of_codes(loaded: Loaded, bits: int) -> int:
    """The best prefetch distance of the codes of quantised weights, in bytes. ``bits`` is 4 or 8; formats of 5 and 6
    bits store four bits of each code as formats of 4 bits do."""

    def ways() -> dict[int, Callable[[], object]]:
        kind, rows = FORMATS[{4: "q4_0", 8: "q8_0"}[bits]], WEIGHTS // (1024 * bits // 8)
        weight = kind.allocate(rows, 1024, torch.bfloat16, _written)
        return {distance: _linear(loaded, _ones(1, 1024), weight, distance) for distance in GROUPED_DISTANCES}

    return _choice(f"prefetch {bits} bits", list(GROUPED_DISTANCES), ways, _shortest, loaded.target.name)


def _shortest(seconds: Mapping[int, float]) -> int:
    """The shortest of the distances that are nearly as fast as the fastest one."""
    best = min(seconds.values())
    return next(distance for distance in sorted(seconds) if NEARLY * seconds[distance] <= best)


def _written(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of ones, like weights in huge pages if the system has them. Memory of zeros that nobody has written
    would all be one physical page."""
    tensor = torch.empty(shape, dtype=dtype, device="cpu")
    start, end = -(-tensor.data_ptr() // mmap.PAGESIZE), (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE
    if hasattr(mmap, "MADV_HUGEPAGE") and start < end:
        span = ctypes.c_void_p(start * mmap.PAGESIZE), ctypes.c_size_t((end - start) * mmap.PAGESIZE)
        ctypes.CDLL(None).madvise(*span, mmap.MADV_HUGEPAGE)  # only advice: it may fail
    return tensor.fill_(1)


def _ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bfloat16, device="cpu")


def _linear(loaded: Loaded, x: torch.Tensor, weight: Weight, distance: int = 0) -> Callable[[], object]:
    """A function that multiplies x by a weight transposed. It keeps its tensors alive."""
    (tokens, k), n = x.shape, len(weight)
    scratch = torch.empty(linear_scratch(loaded.limits, tokens, k, 1), dtype=torch.float32, device="cpu")
    nothing = dict.fromkeys(("norm_weight", "bias", "addend"))
    call = make.linear(
        **nothing,
        out=x.new_empty(tokens, n),
        scratch=scratch,
        x=x,
        weight=weight_struct(weight),
        up=NO_WEIGHT,
        num_tokens=tokens,
        out_features=n,
        in_features=k,
        x_stride=k,
        addend_stride=0,
        out_stride=n,
        out_is_float=False,
        planes=2,
        prefetch_distance=distance,
        eps=0.0,
    )

    def run(call: Call = call) -> None:
        loaded.library.run(call[1], 1, 1)

    return run


def _choice(question: str, answers: list, ways: Callable[[], dict], rule: Callable[[Mapping], Any], *about: str) -> Any:
    """The remembered answer, or if there is none, the answer that ``rule`` picks from the measured seconds of each
    way."""
    known = None if _renewing else remembered(question, answers, *about)
    if known is not None:
        return known
    started, measured[question] = time.perf_counter(), _now()
    with (
        _disable_current_modes(),
        threads.one_in_torch(),
    ):  # torch's modes, such as a trace or a recording, are off while the ways run
        readings = _readings(ways())
    chosen, agreed = decide(readings, rule)
    logger.info(
        "qwenkern: measured in %.2f s, %s, %s: %s (%s)%s",
        *(time.perf_counter() - started, measured[question], QUESTIONS[question], chosen),
        ", ".join(f"{way} {1e3 * min(times):.2f} ms" for way, times in readings.items()),
        "" if agreed else "; its readings disagree, so the next process measures again",
    )
    if agreed:
        remember(question, answers, chosen, *about)
    else:
        measured[question] += ", readings disagree"
    return chosen


def _now() -> str:
    """The date, and the load average of the last minute if the system has one."""
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return time.strftime("%Y-%m-%d") + load


@contextlib.contextmanager
def renewing() -> Iterator[None]:
    """In this context everything is measured, even if an answer is remembered."""
    global _renewing
    _renewing = True
    try:
        yield
    finally:
        _renewing = False


def _fastest(seconds: Mapping) -> Any:
    return min(seconds, key=seconds.__getitem__)


def _readings(ways: Mapping[Any, Callable[[], object]]) -> dict[Any, list[float]]:
    """The seconds of each way; each round times every way once. A first round of warm-up does not count."""
    readings: dict[Any, list[float]] = {way: [] for way in ways}
    for run in ways.values():
        run()
    ends = time.perf_counter() + SECONDS
    rounds = 0
    while rounds < ROUNDS or (time.perf_counter() < ends and rounds < 10 * ROUNDS):
        for way, run in ways.items():
            started = time.thread_time()
            run()
            readings[way].append(time.thread_time() - started)
        rounds += 1
    return readings


def decide(readings: Mapping[Any, list[float]], rule: Callable[[Mapping], Any]) -> tuple[Any, bool]:
    """The answer that ``rule`` picks from the best readings, and whether it picks the same from each half of them."""
    whole, *halves = (
        rule({way: min(seconds[part]) for way, seconds in readings.items()})
        for part in (slice(None), slice(0, None, 2), slice(1, None, 2))
    )
    return whole, halves == [whole, whole]


def remembered(question: str, answers: list, *about: str) -> Any | None:
    """The answer that an earlier process kept, or None if there is none or it is damaged."""
    folder = kept.folder()
    if folder is None:
        return None
    file = folder / _name(question, answers, *about)
    try:
        said = json.loads(file.read_text(encoding="utf-8")) if kept.trusted(file) else {}
        answer, when = said["answer"], str(said.get("measured", "by an earlier version"))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    if type(answer) is not type(answers[0]) or answer not in answers:
        return None
    measured[question] = when
    kept.used(file)
    return answer


def remember(question: str, answers: list, answer: Any, *about: str) -> None:
    """Keeps an answer for later processes. The file is renamed into place, so concurrent processes see a whole file."""
    folder = kept.folder()
    if folder is None:
        return
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix="making-") as making:
            with open(os.path.join(making, "choice"), "w", encoding="utf-8") as stream:
                json.dump({"question": question, "answer": answer, "measured": measured.get(question, _now())}, stream)
            os.chmod(stream.name, 0o644)  # independent of the umask
            os.replace(stream.name, folder / _name(question, answers, *about))
    except OSError as error:
        logger.info("qwenkern: a measurement cannot be kept in %s: %s", folder, error.strerror)


def _name(question: str, answers: list, *about: str) -> str:
    """The name of the file that keeps an answer. It depends on the processor, the C files, and torch and its
    settings."""
    rivals = (torch.__version__, torch.backends.cpu.get_cpu_capability(), os.environ.get("ONEDNN_MAX_CPU_ISA", ""))
    facts = (*map(str, answers), *about, processor(), *rivals)
    return f"choice-{question.replace(' ', '-')}-{hashlib.sha256(digest(*facts).encode()).hexdigest()[:16]}.json"
