"""The library of C functions that this process uses: built with the package, or compiled here at the first use.

``prepare`` finds, compiles, loads and measures, once; everything else asks what it found."""

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

from . import choose, compiler, kept, limits, targets, threads
from .targets import Target

logger = logging.getLogger(__name__)
PROBLEMS = (compiler.CompilerError, compiler.Refused, OSError)
BUILT = Path(__file__).parent / "built"  # what setup.py puts into a wheel; a source checkout has none
NOT_PREPARED = "anything before it is prepared"
LONG = 1.0  # seconds that measuring may take before it is said

_deciding = threading.RLock()  # one thread prepares; others wait for what it finds
_found: Prepared | str | None = None  # or why there is no C; None: nobody has prepared it


class Loaded(NamedTuple):
    library: ctypes.CDLL
    target: Target
    origin: str  # where it comes from
    limits: Any  # what its ops take: the fields of `limits` in calls.h


class Prepared(NamedTuple):
    """A library, and what was measured with it."""

    library: ctypes.CDLL
    target: Target
    origin: str
    limits: Any
    multiplies: bool  # many tokens run faster here than in torch
    prefetch_distance: int  # bytes before they are needed that weights are asked for


def prepare() -> str | None:
    """Loads the library, compiled if it must be, and measures what is fastest, unless an earlier call or an earlier
    process did: seconds, once on a machine. Returns None, or why C cannot run here, which a warning has said once.

    Raises ValueError where QWENKERN_CPU_TARGET is wrong."""
    global _found
    if _found is None:
        with _deciding:
            if _found is None:
                _found = _prepared()
    return _found if isinstance(_found, str) else None


def prepared() -> Prepared:
    """What ``prepare`` has found; prepares where nobody has. Raises RuntimeError where C cannot run."""
    if not isinstance(_found, Prepared) and (reason := prepare()):
        raise RuntimeError(f"the C kernels cannot run here: {reason}")
    assert isinstance(_found, Prepared)
    return _found


def refuses() -> str | None:
    """Why C cannot run here, or None. Prepares nothing."""
    if isinstance(_found, Prepared):
        return None
    return NOT_PREPARED if _found is None else _found


def refuses_dtype(dtype: torch.dtype) -> str | None:
    """Why no C op takes floats of this type, or None."""
    if dtype != torch.bfloat16:
        return f"{str(dtype).removeprefix('torch.')} (C computes in bfloat16)"
    return refuses()


def library() -> ctypes.CDLL | None:
    """The compiled functions, prepared, or None where there are none."""
    return None if prepare() else prepared().library


def target() -> str | None:
    """The name of the target that the functions in use were compiled for."""
    return None if prepare() else prepared().target.name


def _prepared() -> Prepared | str:
    """The best of this processor's targets that can be had. One that multiplies pairs of bfloat16 gives way to the one
    that widens them where that measures faster."""
    candidates = targets.usable()
    found, problem = _first(candidates)
    if found is None:
        return problem
    rivals = {found.target.name: found}
    for other in candidates:
        if other.name == found.target.floats:
            with contextlib.suppress(*PROBLEMS):  # then there is no choice
                rivals[other.name] = _load(other)
    with _said_if_long("qwenkern: measuring which C kernels are fastest here (some seconds, once)"):
        if len(rivals) > 1:
            found = rivals[choose.products(rivals)]
        return Prepared(*found, choose.multiplies(found), choose.prefetch(found))


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
    """Raises ValueError where QWENKERN_CPU_TARGET or QWENKERN_THREADS is wrong; loads nothing."""
    targets.usable()
    threads.count()


def forget() -> None:
    """The next call prepares anew."""
    global _found
    _found = None


def describe() -> dict[str, str]:
    """What runs on this CPU: target, threads, and what was measured, with the day and the load; loads, and measures,
    what is not known yet."""
    return {name: says + (f" (measured {when})" if when else "") for name, (says, when) in _described().items()}


def renew() -> dict[str, tuple[str, str]]:
    """Measures everything anew, whatever is remembered, and keeps what readings agree on. What describe says after it,
    and before it."""
    before = _described()
    forget()
    with choose.renewing():
        _described()
    after = describe()
    return {name: (says, before[name][0] if name in before else "") for name, says in after.items()}


def _described() -> dict[str, tuple[str, str]]:
    """By what it is about: what is so, and when it was measured, if it was."""
    if prepare():
        return {"CPU": ("no C, so torch runs", ""), "threads": (str(threads.count()), "")}
    here = prepared()
    distance = here.prefetch_distance
    when = {question: choose.measured.get(question, "") for question in choose.QUESTIONS}
    return {
        "CPU": (f"C for {here.target.name}, {here.origin}", when["products"]),
        "threads": (str(threads.count()), ""),
        "many tokens": ("multiplied in C" if here.multiplies else "multiplied by torch", when["many tokens"]),
        "weights": (
            f"asked for {distance} bytes in advance" if distance else "not asked for in advance",
            when["prefetch"],
        ),
    }


def _first(candidates: list[Target]) -> tuple[Loaded | None, str]:
    """The first that loads, and why a better one, or any, does not, which a warning says."""
    found, problem = None, None
    for each in candidates:
        try:
            found = _load(each)
            break
        except PROBLEMS as error:
            problem = problem or error
            if isinstance(error, compiler.NoCompiler) and not BUILT.is_dir():
                break  # the other targets would wait for it, too
    if problem is not None:
        instead = f"the C functions for {found.target.name} run" if found else "torch runs in place of C, slower"
        warnings.warn(f"qwenkern: {problem}; {instead}", stacklevel=2)
    return found, str(problem)


def _load(target: Target) -> Loaded:
    """A target's library as it came with the package, as it was compiled earlier, or compiled now; else one of PROBLEMS
    is raised."""
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
        except (OSError, compiler.Refused) as error:  # a full or read-only disk, one that nothing may be run from
            logger.warning("qwenkern: cannot keep what it compiles in %s: %s", folder, error)
    with tempfile.TemporaryDirectory() as place:
        compiler.compile_to(Path(place, name), target.flags)
        return _open(Path(place, name), target, "compiled for this process only")


def _kept(file: Path, target: Target) -> Loaded | None:
    """A library that an earlier process compiled, if it is there and what it should be."""
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
    """A library of the same files and flags by another compiler, where there is none here: as an image is run that
    another one filled the cache of."""
    files = sorted(folder.glob(f"*-{target.name}.so")) if folder and target.needs else ()
    fits = (file for file in files if file.name[17:] == f"{target.name}.so" and compiler.fits(file, target.flags))
    return next(filter(None, (_kept(file, target) for file in fits)), None)


def _key(target: Target) -> str:
    """Of a library that was compiled here: other C files, flags, or a compiler of another name make another."""
    native = () if target.needs else (targets.processor(),)
    named = compiler.given() or compiler.command()[0]
    return compiler.digest(*compiler.FLAGS, *target.flags, named, *native)[:16]


def _open(file: Path, target: Target, origin: str) -> Loaded:
    """Loads a library that is what its manifest says; raises Refused."""
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
    """Lets the functions run in the threads of torch's OpenMP, where it has one: two pools would compete for cores."""
    if os.name != "posix":
        return
    process = ctypes.CDLL(None)
    with contextlib.suppress(AttributeError):
        parallel, present = process.GOMP_parallel, process.omp_get_num_threads
        ctypes.c_void_p.in_dll(library, "parallel").value = ctypes.cast(parallel, ctypes.c_void_p).value
        ctypes.c_void_p.in_dll(library, "present").value = ctypes.cast(present, ctypes.c_void_p).value
