"""Compiles the C files, once for each version of them, compiler and processor. CC chooses the compiler."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

_FOLDER = Path(__file__).parent
_FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled functions, or None, with a warning, where they cannot be compiled."""
    try:
        loaded = ctypes.CDLL(str(_build()))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or error
        warnings.warn(f"qwenkern: no C compiler could build {_FOLDER}, so torch runs it, slower: {said}", stacklevel=2)
        return None
    loaded.run.argtypes = (ctypes.c_void_p, ctypes.c_long, ctypes.c_int)
    loaded.run.restype = None
    return loaded


@functools.cache
def multiplies() -> bool:
    """Whether products of matrices are faster here than torch's: not where torch has the processor's matrix unit."""
    found = library()
    return found is not None and bool(ctypes.c_int.in_dll(found, "has_products")) and "amx_bf16" not in _processor()


def _build() -> Path:
    compiler = shlex.split(os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), "cc"))
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    files = sorted(_FOLDER.glob("*.[ch]"))
    facts = (*(file.read_text() for file in files), *_FLAGS, *compiler, version, _processor())
    key = hashlib.sha256("\0".join(facts).encode()).hexdigest()[:16]
    shared = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cache = Path(os.environ.get("QWENKERN_CACHE") or Path(shared, "qwenkern")).expanduser() / "compiled"
    built = cache / f"cpu-{key}.so"
    if not built.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:  # moved when complete: another process may build it too
            target = Path(folder) / built.name
            sources = [str(file) for file in files if file.suffix == ".c"]
            command = [*compiler, *_FLAGS, *sources, "-o", str(target), "-lm"]
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
            os.replace(target, built)
    return built


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
