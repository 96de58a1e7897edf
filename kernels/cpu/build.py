"""Compiles the C files, once for each version of them, compiler and processor. CC chooses the compiler."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch

from . import choose

logger = logging.getLogger(__name__)
_FOLDER = Path(__file__).parent
_FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-pthread", "-shared", "-fPIC")
_VARIANTS = {"floats": (), "pairs": ("-DPAIRS",)}  # the second one where the processor multiplies pairs of bfloat16


def library() -> ctypes.CDLL | None:
    """The compiled functions, or None, with a warning, where they cannot be compiled."""
    found = chosen()
    return found and found[0]


def multiplies() -> bool:
    """Whether many tokens run here faster than in torch."""
    found = chosen()
    return found is not None and found[1].beats_torch


@functools.cache
def chosen() -> tuple[ctypes.CDLL, choose.Choice] | None:
    """The compiled functions and how they are best used."""
    try:
        compiler = shlex.split(os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), "cc"))
        key = _key(compiler)
        file = _cache() / f"cpu-{key}.json"
        choice = choose.remembered(file)
        if choice is None:
            logger.warning(
                "qwenkern: compiles for this processor and measures what is fastest on it, once: some seconds"
            )
            variants = {name: _load(compiler, key, name) for name in _VARIANTS if can(compiler, name)}
            choice = choose.measure(variants)
            choose.remember(file, choice)
        loaded = _load(compiler, key, choice.products)
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or error
        warnings.warn(f"qwenkern: no C compiler could build {_FOLDER}, so torch runs it, slower: {said}", stacklevel=2)
        return None
    ctypes.c_long.in_dll(loaded, "ahead").value = choice.ahead
    return loaded, choice


def _load(compiler: list[str], key: str, variant: str) -> ctypes.CDLL:
    built = _cache() / f"cpu-{key}-{variant}.so"
    if not built.exists():
        with tempfile.TemporaryDirectory(dir=built.parent) as folder:  # moved when complete: others may build it too
            target = Path(folder) / built.name
            sources = [str(file) for file in _files() if file.suffix == ".c"]
            command = [*compiler, *_FLAGS, *_VARIANTS[variant], *sources, "-o", str(target), "-lm"]
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
            os.replace(target, built)
    loaded = ctypes.CDLL(str(built))
    loaded.run.argtypes = (ctypes.c_void_p, ctypes.c_long, ctypes.c_int)
    loaded.run.restype = None
    _share_threads(loaded)
    return loaded


def _share_threads(loaded: ctypes.CDLL) -> None:
    """Lets the functions run in the threads of torch's OpenMP, where it has one: two pools would compete for the cores."""
    process = ctypes.CDLL(None)
    with contextlib.suppress(AttributeError):
        parallel, present = process.GOMP_parallel, process.omp_get_num_threads
        ctypes.c_void_p.in_dll(loaded, "parallel").value = ctypes.cast(parallel, ctypes.c_void_p).value
        ctypes.c_void_p.in_dll(loaded, "present").value = ctypes.cast(present, ctypes.c_void_p).value


def can(compiler: list[str], variant: str) -> bool:
    """Whether this processor has what the variant uses."""
    if variant == "floats":
        return True
    command = [*compiler, *_FLAGS, "-dM", "-E", "-x", "c", os.devnull]
    macros = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    return "__AVX512BF16__" in macros


def _cache() -> Path:
    shared = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("QWENKERN_CACHE") or Path(shared, "qwenkern")).expanduser() / "compiled"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _key(compiler: list[str]) -> str:
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    texts = (file.read_text(encoding="utf-8") for file in _files())
    facts = (*texts, *_FLAGS, *compiler, version, _processor(), torch.__version__)
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:16]


def _files() -> list[Path]:
    return sorted(_FOLDER.glob("*.[ch]"))


@functools.cache
def _processor() -> str:
    """What -march=native means here."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return "\n".join(
        sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    )
