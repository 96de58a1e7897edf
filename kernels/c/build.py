"""The library of C functions that this process uses: built with the package, or compiled here at the first use."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import tempfile
import threading
import warnings
from pathlib import Path
from typing import NamedTuple

from . import choose, compiler, kept, targets, threads
from .targets import Target

logger = logging.getLogger(__name__)
PROBLEMS = (compiler.CompilerError, compiler.Refused, OSError)
BUILT = Path(__file__).parent / "built"  # what setup.py puts into a wheel; a source checkout has none


_deciding = threading.RLock()  # one thread compiles and measures; others wait for what it decides


class Loaded(NamedTuple):
    library: ctypes.CDLL
    target: Target
    origin: str  # where it comes from


def library() -> ctypes.CDLL | None:
    """The compiled functions, or None, with a warning, where there are none. Raises ValueError where
    QWENKERN_CPU_TARGET is wrong."""
    found = loaded()
    return found and found.library


def target() -> str | None:
    """The name of the target that the functions in use were compiled for."""
    found = loaded()
    return found and found.target.name


@functools.cache
def multiplies() -> bool:
    """Whether many tokens run here faster than in torch; measured when it is first asked."""
    with _deciding:
        return _multiplies()


@functools.cache
def loaded() -> Loaded | None:
    """The library in use, decided when it is first asked for."""
    with _deciding:
        return _loaded()


@functools.cache
def _multiplies() -> bool:
    found = loaded()
    return found is not None and choose.multiplies(found.library, found.target.name)


@functools.cache
def _loaded() -> Loaded | None:
    """The best of this processor's targets that can be had. One that multiplies pairs of bfloat16 gives way to the one
    that widens them where that measures faster."""
    candidates = targets.usable()
    found = _first(candidates)
    if found is None:
        return None
    rivals = {found.target.name: found}
    for other in candidates:
        if other.name == found.target.floats:
            with contextlib.suppress(*PROBLEMS):  # then there is no choice
                rivals[other.name] = _load(other)
    if len(rivals) > 1:
        found = rivals[choose.products({name: each.library for name, each in rivals.items()})]
    choose.set_prefetch(found.library, choose.prefetch(found.library, found.target.name))
    return found


def check_environment() -> None:
    """Raises ValueError where QWENKERN_CPU_TARGET or QWENKERN_THREADS is wrong; loads nothing."""
    targets.usable()
    threads.count()


def forget() -> None:
    """The next call decides anew."""
    for decided in (loaded, multiplies, _loaded, _multiplies):
        decided.cache_clear()


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
    found = loaded()
    if not found:
        return {"CPU": ("no C, so torch runs", ""), "threads": (str(threads.count()), "")}
    many, distance = multiplies(), choose.get_prefetch(found.library)
    when = {question: choose.measured.get(question, "") for question in choose.QUESTIONS}
    return {
        "CPU": (f"C for {found.target.name}, {found.origin}", when["products"]),
        "threads": (str(threads.count()), ""),
        "many tokens": ("multiplied in C" if many else "multiplied by torch", when["many tokens"]),
        "weights": (
            f"asked for {distance} bytes in advance" if distance else "not asked for in advance",
            when["prefetch"],
        ),
    }


def _first(candidates: list[Target]) -> Loaded | None:
    """The first that loads. A warning says why a better one, or any, does not."""
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
    return found


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
    logger.warning("qwenkern: compiles its C functions for %s: some seconds, once", target.name)
    if file:
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
    return Loaded(library, target, origin)


def _share_threads(library: ctypes.CDLL) -> None:
    """Lets the functions run in the threads of torch's OpenMP, where it has one: two pools would compete for cores."""
    if os.name != "posix":
        return
    process = ctypes.CDLL(None)
    with contextlib.suppress(AttributeError):
        parallel, present = process.GOMP_parallel, process.omp_get_num_threads
        ctypes.c_void_p.in_dll(library, "parallel").value = ctypes.cast(parallel, ctypes.c_void_p).value
        ctypes.c_void_p.in_dll(library, "present").value = ctypes.cast(present, ctypes.c_void_p).value
