"""The library of C functions that this process uses. It was built with the package, or is compiled here at the first
use.

``prepare`` finds or compiles the library, loads it and measures, once. The other functions return its results."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import tempfile
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..environment import CPU_ACTIVATIONS
from . import choose, compiler, kept, limits, targets, threads
from .targets import Target

logger = logging.getLogger(__name__)
PROBLEMS = (compiler.CompilerError, compiler.Refused, OSError)
DTYPES = (torch.bfloat16, torch.float32)  # of activations
BUILT = Path(__file__).parent / "built"  # the folder that setup.py puts into a wheel; a source checkout has none
NOT_PREPARED = "anything before it is prepared"
LONG = 1.0  # seconds of measuring after which a progress line is logged

_deciding = threading.RLock()  # one thread prepares, and the others wait for it
_found: Prepared | str | None = None  # a str: the reason why C cannot run; None: not prepared yet


class Loaded(NamedTuple):
    library: ctypes.CDLL
    target: Target
    origin: str  # how the library was made, in words
    limits: Any  # the limits of its ops: the fields of `limits` in calls.h


class Prepared(NamedTuple):
    """A library, and the results of measuring with it."""

    library: ctypes.CDLL
    target: Target
    origin: str
    limits: Any
    multiplies: bool  # whether C multiplies many tokens, because it is about as fast as torch or faster
    prefetch_distance: int  # how many bytes in advance dense weights are prefetched
    prefetch_of_codes: dict[int, int]  # the same for quantised weights, by the bits of a code: 4 or 8


def prepare() -> str | None:
    """Finds or compiles the library, loads it, and measures what is fastest. Both results are kept for later calls and
    later processes, so a machine spends these seconds once. Returns None, or the reason why C cannot run here; a
    warning has then given the reason once.

    Raises ValueError if QWENKERN_CPU_TARGET is invalid."""
    global _found
    if _found is None:
        with _deciding:
            if _found is None:
                _found = _prepared()
    return _found if isinstance(_found, str) else None


def prepared() -> Prepared:
    """The library and its measurements. Calls ``prepare`` if nobody has called it yet. Raises RuntimeError if C cannot
    run here."""
    if not isinstance(_found, Prepared) and (reason := prepare()):
        raise RuntimeError(f"the C kernels cannot run here: {reason}")
    assert isinstance(_found, Prepared)
    return _found


def refuses() -> str | None:
    """The reason why C cannot run here, or None. Prepares nothing."""
    if isinstance(_found, Prepared):
        return None
    return NOT_PREPARED if _found is None else _found


def refuses_dtype(dtype: torch.dtype) -> str | None:
    """The reason why no C op takes activations of this dtype, or None."""
    if dtype not in DTYPES:
        return f"{str(dtype).removeprefix('torch.')} (C takes bfloat16 and float32)"
    return refuses()


def library() -> ctypes.CDLL | None:
    """The library, after ``prepare``, or None if C cannot run here."""
    return None if prepare() else prepared().library


def target() -> str | None:
    """The name of the target that the library in use was compiled for, or None if C cannot run here."""
    return None if prepare() else prepared().target.name


def _prepared() -> Prepared | str:
    """Loads the library of the best usable target, and measures with it. If that target multiplies pairs of bfloat16,
    the target that widens them to float32 is measured too, and the faster one is used."""
    candidates = targets.usable()
    found, problem = _first(candidates)
    if found is None:
        return problem
    rivals = {found.target.name: found}
    for other in candidates:
        if other.name == found.target.floats:
            with contextlib.suppress(*PROBLEMS):  # without the second library there is nothing to compare
                rivals[other.name] = _load(other)
    with _said_if_long("qwenkern: measuring which C kernels are fastest here (some seconds, once)"):
        if len(rivals) > 1:
            found = rivals[choose.products(rivals)]
        of_codes = {bits: choose.prefetch_of_codes(found, bits) for bits in (4, 8)}
        return Prepared(*found, choose.multiplies(found), choose.prefetch(found), of_codes)


@contextlib.contextmanager
def _said_if_long(message: str) -> Iterator[None]:
    timer = threading.Timer(LONG, logger.warning, (message,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def check_environment() -> None:
    """Raises ValueError if QWENKERN_CPU_TARGET, QWENKERN_THREADS or QWENKERN_CPU_ACTIVATIONS is invalid. Loads
    nothing."""
    targets.usable()
    threads.count()
    CPU_ACTIVATIONS.get()


def forget() -> None:
    """Forgets what ``prepare`` found, so the next call prepares anew."""
    global _found
    _found = None


def describe() -> dict[str, str]:
    """What runs on this CPU, in words: the target, the number of threads, and each measured choice with the day and the
    load average of its measurement. Prepares the backend if it is not prepared."""
    return {name: says + (f" (measured {when})" if when else "") for name, (says, when) in _described().items()}


def renew() -> dict[str, tuple[str, str]]:
    """Measures everything anew, even what is remembered. Keeps a choice if its readings agree. Returns, for each entry
    of ``describe``, the text now and the text before."""
    before = _described()
    forget()
    with choose.renewing():
        _described()
    after = describe()
    return {name: (says, before[name][0] if name in before else "") for name, says in after.items()}


def _described() -> dict[str, tuple[str, str]]:
    """For each entry of ``describe``: its text, and when it was measured (empty if it was not)."""
    if prepare():
        return {"CPU": ("no C, so torch runs", ""), "threads": (str(threads.count()), "")}
    here = prepared()
    when = {question: choose.measured.get(question, "") for question in choose.QUESTIONS}
    return {
        "CPU": (f"C for {here.target.name}, {here.origin}", when["products"]),
        "threads": (str(threads.count()), ""),
        "many tokens": ("multiplied in C" if here.multiplies else "multiplied by torch", when["many tokens"]),
        "weights": (_prefetched(here.prefetch_distance), when["prefetch"]),
        "4-bit weights": (_prefetched(here.prefetch_of_codes[4]), when["prefetch 4 bits"]),
        "8-bit weights": (_prefetched(here.prefetch_of_codes[8]), when["prefetch 8 bits"]),
    }


def _prefetched(distance: int) -> str:
    return f"prefetched {distance} bytes in advance" if distance else "not prefetched"


def _first(candidates: list[Target]) -> tuple[Loaded | None, str]:
    """The library of the first target that loads, and the first problem. A warning reports the problem and what runs
    instead."""
    found, problem = None, None
    for each in candidates:
        try:
            found = _load(each)
            break
        except PROBLEMS as error:
            problem = problem or error
            if isinstance(error, compiler.NoCompiler) and not BUILT.is_dir():
                break  # the other targets need the same compiler
    if problem is not None:
        instead = f"the C functions for {found.target.name} run" if found else "torch runs in place of C, slower"
        warnings.warn(f"qwenkern: {problem}; {instead}", stacklevel=2)
    return found, str(problem)


def _load(target: Target) -> Loaded:
    """The library of a target: the one in the package, one compiled earlier, or one compiled now. Raises one of
    PROBLEMS if there is none."""
    name = f"{target.name}.so"
    if BUILT.is_dir() and target.needs:
        try:
            return _open(BUILT / name, target, "built with the package")
        except compiler.Refused as reason:
            logger.warning("qwenkern: %s", reason)
    folder = kept.folder()
    file = folder and folder / f"{_key(target)}-{name}"
    if file and (found := _kept(file, target)):
        return found
    try:
        compiler.answers()
    except compiler.NoCompiler:
        if found := _made_elsewhere(folder, target):
            return found
        raise
    logger.warning("qwenkern: compiling the C kernels for %s (some seconds, once)", target.name)
    if file and folder:
        try:
            compiler.compile_to(file, target.flags)
            kept.tidy(folder)
            return _open(file, target, "compiled on this machine")
        except (OSError, compiler.Refused) as error:  # such as a disk that is full, read-only or mounted noexec
            logger.warning("qwenkern: cannot keep what it compiles in %s: %s", folder, error)
    with tempfile.TemporaryDirectory() as place:
        compiler.compile_to(Path(place, name), target.flags)
        return _open(Path(place, name), target, "compiled for this process only")


def _kept(file: Path, target: Target) -> Loaded | None:
    """A library that an earlier process compiled, or None if there is none or it fails a check."""
    try:
        if not kept.trusted(file):
            raise compiler.Refused(f"{file} may be another user's work")
        found = _open(file, target, "compiled on this machine")
    except FileNotFoundError:
        return None
    except (OSError, compiler.Refused) as reason:
        logger.warning("qwenkern: %s", reason)
        return None
    for each in (file, file.with_suffix(".json")):
        kept.used(each)
    return found


def _made_elsewhere(folder: Path | None, target: Target) -> Loaded | None:
    """A library that another compiler made from the same files and with the same flags, for a machine without a
    compiler. An example is a container image whose cache was filled in another image."""
    files = sorted(folder.glob(f"*-{target.name}.so")) if folder and target.needs else ()
    fits = (file for file in files if file.name[17:] == f"{target.name}.so" and compiler.fits(file, target.flags))
    return next(filter(None, (_kept(file, target) for file in fits)), None)


def _key(target: Target) -> str:
    """The beginning of the file name of a library that is compiled here. It depends on the C files, the flags and the
    compiler's name."""
    native = () if target.needs else (targets.processor(),)
    named = compiler.given() or compiler.command()[0]
    return compiler.digest(*compiler.FLAGS, *target.flags, named, *native)[:16]


def _open(file: Path, target: Target, origin: str) -> Loaded:
    """Loads a library if it matches its manifest. Raises Refused otherwise."""
    compiler.check(file, target.flags)
    try:
        library = ctypes.CDLL(str(file))
    except OSError as error:
        raise compiler.Refused(f"{file} does not load: {error}") from None
    library.run.argtypes = (ctypes.c_void_p, ctypes.c_long, ctypes.c_int)
    library.run.restype = None
    _share_threads(library)
    return Loaded(library, target, origin, limits.of_library(library))


def _share_threads(library: ctypes.CDLL) -> None:
    """Lets the library run its ops in the threads of torch's OpenMP, if torch uses it. Two thread pools would compete
    for the cores."""
    if os.name != "posix":
        return
    process = ctypes.CDLL(None)
    with contextlib.suppress(AttributeError):
        parallel, present = process.GOMP_parallel, process.omp_get_num_threads
        ctypes.c_void_p.in_dll(library, "parallel").value = ctypes.cast(parallel, ctypes.c_void_p).value
        ctypes.c_void_p.in_dll(library, "present").value = ctypes.cast(present, ctypes.c_void_p).value
