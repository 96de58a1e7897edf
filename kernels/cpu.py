"""Few-token linears on a CPU: cpu.c, compiled by the machine's own compiler at the first use and kept.

torch reads bfloat16 weights for one token at half of the memory's bandwidth; this reads them at what the memory gives,
for a few tokens at once, without a second copy of them. Where no C compiler works, a warning says so once and the
torch twin runs.
"""

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

import torch
from torch import Tensor

MAX_TOKENS = 16
LANES = 32
_SOURCE = Path(__file__).with_name("cpu.c")
_FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")


def takes(x: Tensor) -> bool:
    """Whether x [T, K] is of a kind that cpu.c takes, and cpu.c can be used here."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.bfloat16
        and len(x) <= MAX_TOKENS
        and x.shape[1] % LANES == 0
        and os.environ.get("QWENKERN_KERNELS") != "reference"
        and _library() is not None
    )


def few_tokens(
    x: Tensor,
    weight: Tensor,
    *,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    up: Tensor | None = None,
    bias: Tensor | None = None,
    addend: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor]:
    """x [T, K] times weight [N, K] transposed, plus bias [N], plus addend [T, N]: (out [T, N], new residual [T, K]).

    With ``norm_weight`` [K] x is first added to ``residual`` and normalised; with ``up`` [N, K] out is
    silu(x weight^T) * (x up^T). Without a residual, the new one is x itself."""
    num_tokens, k = x.shape
    n = len(weight)
    out = x.new_empty(num_tokens, n, dtype=out_dtype)
    new_residual = None if residual is None else x.new_empty(num_tokens, k)
    rows = x.new_empty(num_tokens, k)
    _library()(
        *(None if t is None else t.data_ptr() for t in (out, new_residual, rows, x, residual)),
        *(None if t is None else t.data_ptr() for t in (norm_weight, weight, up, bias, addend)),
        *(num_tokens, n, k, x.stride(0), 0 if residual is None else residual.stride(0), weight.stride(0)),
        0 if addend is None else addend.stride(0),
        *(eps, out_dtype == torch.float32, torch.get_num_threads()),
    )
    return out, x if new_residual is None else new_residual


@functools.cache
def _library():
    """The compiled function, or None."""
    try:
        function = ctypes.CDLL(str(_build())).few_tokens
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or error
        warnings.warn(
            f"qwenkern: no C compiler could build {_SOURCE.name}, so torch runs it, slower: {said}", stacklevel=2
        )
        return None
    function.restype = None
    function.argtypes = [ctypes.c_void_p] * 10 + [ctypes.c_long] * 7 + [ctypes.c_float, ctypes.c_int, ctypes.c_int]
    return function


def _build() -> Path:
    """Compiles cpu.c, once for each version of it, compiler and processor. CC chooses the compiler."""
    compiler = shlex.split(os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), "cc"))
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    key = hashlib.sha256(
        "\0".join((_SOURCE.read_text(), *_FLAGS, *compiler, version, _processor())).encode()
    ).hexdigest()[:16]
    shared = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cache = Path(os.environ.get("QWENKERN_CACHE") or Path(shared, "qwenkern")).expanduser() / "compiled"
    built = cache / f"cpu-{key}.so"
    if not built.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:  # moved when complete: another process may build it too
            target = Path(folder) / built.name
            command = [*compiler, *_FLAGS, str(_SOURCE), "-o", str(target), "-lm"]
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
            os.replace(target, built)
    return built


def _processor() -> str:
    """What -march=native means here."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return "\n".join(
        sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    )
