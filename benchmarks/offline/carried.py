"""Kernels that are compiled on one machine and used on another, which has the GPU.

Triton keeps a compiled kernel in a folder whose name is a hash of several parts: Triton's own files, the kernel's
source and signature, the assembler's version and the architecture, the launch options (dependent launch is one), and
some environment variables (triton/runtime/cache.py, get_cache_key; no GPU is among them). ``compiling`` stores the
parts that depend on the kernel. ``unpack`` computes the hash anew with the parts that depend on the other machine, so
only the version of Triton must be the same. The other machine compiles a kernel that was not carried.
"""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel, compiler
from triton.compiler.compiler import make_backend
from triton.runtime import cache
from triton.runtime.jit import JITFunction

from qwenkern.kernels.triton import tuning
from qwenkern.kernels.triton.offline import active

KEYS = "keys"  # the folder in Triton's cache with the parts of each key
CARRIED = (".json", ".cubin")  # the files of a kernel that a launch needs


@contextlib.contextmanager
def compiling(device: tuning.Device, dependent: Sequence[bool], folder: Path) -> Iterator[list[str]]:
    """In this context kernels are compiled for the device into Triton's cache ``folder``, and not launched, for tensors
    of any device. Yields the names of the compiled kernels. ``dependent`` says whether to compile with dependent
    launch, without it, or both."""
    run, names = JITFunction.run, []

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> CompiledKernel:
        keywords.pop("launch_pdl", None)
        for on in dependent if keywords.get("PDL") else (False,):
            chosen = keywords | ({"PDL": on} if "PDL" in keywords else {}) | ({"launch_pdl": True} if on else {})
            kernel = run(self, *args, grid=grid, warmup=True, **chosen)
            names.append(self.__name__)
        return kernel

    with (
        mock.patch.object(triton.knobs.cache, "dir", str(folder)),
        mock.patch.object(compiler, "get_cache_key", _recording(folder / KEYS)),
        tuning.offline(device),
        mock.patch.object(tuning, "INTERPRETER", device),
        active(device),
        mock.patch.object(JITFunction, "run", compile_only),
    ):
        yield names


def _recording(folder: Path) -> Callable[..., str]:
    folder.mkdir(parents=True, exist_ok=True)

    def get_cache_key(src: Any, backend: Any, options: Any, env_vars: dict[str, Any]) -> str:
        key = cache.get_cache_key(src, backend, options, env_vars)
        name = sha256(key.encode()).hexdigest()
        parts = {"source": src.hash(), "options": options.hash(), "arch": backend.target.arch}
        (folder / f"{name}.json").write_text(json.dumps(parts), encoding="utf-8")
        return key

    return get_cache_key


def pack(folder: Path, file: Path) -> int:
    """Writes the kernels that ``compiling`` compiled into a cache folder to an archive. Returns their number."""
    count = 0
    with tarfile.open(file, "w:xz") as archive:
        _add(archive, "triton", triton.__version__.encode())
        for parts in sorted((folder / KEYS).glob("*.json")):
            files = [each for each in _folder(folder, parts.stem).glob("*") if each.suffix in CARRIED]
            files = [each for each in files if not each.name.startswith("__grp__")]
            if {each.suffix for each in files} == set(CARRIED):
                _add(archive, f"{parts.stem}/{KEYS}", parts.read_bytes())
                for each in files:
                    _add(archive, f"{parts.stem}/{each.name}", each.read_bytes())
                count += 1
    return count


def unpack(file: Path, folder: Path) -> int:
    """Puts an archive's kernels where Triton finds them if ``folder`` is its cache. Returns their number. Raises
    ValueError if the archive is from another version of Triton."""
    kernels: dict[str, dict[str, bytes]] = {}
    version = ""
    with tarfile.open(file, "r:xz") as archive:
        for member in archive:
            content = archive.extractfile(member)
            data = content.read() if content else b""
            if member.name == "triton":
                version = data.decode()
            else:
                kernel, _, name = member.name.partition("/")
                kernels.setdefault(kernel, {})[name] = data
    if version != triton.__version__:
        raise ValueError(f"{file} has kernels of Triton {version}; expected {triton.__version__}")
    for files in kernels.values():
        place = _folder(folder, sha256(_key_here(json.loads(files.pop(KEYS))).encode()).hexdigest())
        place.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (place / name).write_bytes(data)
        (metadata,) = (name for name in files if name.endswith(".json"))
        group = {"child_paths": {name: str(place / name) for name in files}}
        (place / f"__grp__{metadata}").write_text(json.dumps(group), encoding="utf-8")
    return len(kernels)


def _key_here(parts: dict[str, Any]) -> str:
    """The key of a kernel on this machine, as get_cache_key computes it."""
    hashed = {name: mock.Mock(**{"hash.return_value": parts[name]}) for name in ("source", "options")}
    backend = make_backend(GPUTarget("cuda", parts["arch"], 32))
    return cache.get_cache_key(hashed["source"], backend, hashed["options"], _variables())


def _variables() -> dict[str, Any]:
    return compiler.get_cache_invalidating_env_vars()


def _folder(folder: Path, name: str) -> Path:
    return folder / cache._base32(name)


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))
