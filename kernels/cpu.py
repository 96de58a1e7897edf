"""A decode step's ops on a CPU: cpu.c, compiled by the machine's own compiler at the first use and kept.

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
MAX_GROUP = 16  # query heads of a key-value head
SPLIT = 256  # cached tokens that a thread attends to at a time; all three as in cpu.c
LANES = 32
_SOURCE = Path(__file__).with_name("cpu.c")
_FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")


def takes(x: Tensor) -> bool:
    """Whether x [T, K] is of a kind that cpu.c takes, and cpu.c can be used here."""
    return len(x) <= MAX_TOKENS and x.shape[1] % LANES == 0 and _usable(x)


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
    _library().few_tokens(
        *(None if t is None else t.data_ptr() for t in (out, new_residual, rows, x, residual)),
        *(None if t is None else t.data_ptr() for t in (norm_weight, weight, up, bias, addend)),
        *(num_tokens, n, k, x.stride(0), 0 if residual is None else residual.stride(0), weight.stride(0)),
        0 if addend is None else addend.stride(0),
        *(eps, out_dtype == torch.float32, torch.get_num_threads()),
    )
    return out, x if new_residual is None else new_residual


def takes_heads(q: Tensor, k_pages: Tensor) -> bool:
    """Whether q [.., Hq, D] over pages [.., Hkv, D] suits cpu.c; q may still be packed with k and v."""
    num_kv_heads, head_dim = k_pages.shape[-2:]
    group = q.shape[1] // num_kv_heads if q.dim() == 3 else 1
    return head_dim in (32, 64, 96, 128) and group <= MAX_GROUP and _usable(q)


def rope_and_cache(
    qkv: Tensor, positions: Tensor, cos_sin: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor
) -> Tensor:
    """As the public op."""
    num_kv_heads, head_dim = k_pages.shape[-2:]
    q = qkv.new_empty(len(qkv), qkv.shape[1] // head_dim - 2 * num_kv_heads, head_dim)
    positions, slots = positions.long().contiguous(), slots.long().contiguous()
    _library().rope_and_cache(
        *(t.data_ptr() for t in (q, k_pages, v_pages, qkv, positions, slots, cos_sin)),
        *(len(qkv), q.shape[1], num_kv_heads, head_dim, qkv.stride(0)),
    )
    return q


def decode_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, block_tables: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    """As the public op. The cache is read where it lies."""
    q = q if q.stride(1) == q.shape[2] else q.contiguous()
    block_tables, lengths = block_tables.int().contiguous(), lengths.int().contiguous()
    (num_sequences, num_q_heads, head_dim), (_, page_size, num_kv_heads, _) = q.shape, k_pages.shape
    splits = -(-int(lengths.max()) // SPLIT)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    parts = q.new_empty(num_sequences, num_q_heads, splits, head_dim + 2, dtype=torch.float32)
    _library().decode_attention(
        *(t.data_ptr() for t in (out, parts, q, k_pages, v_pages, block_tables, lengths)),
        *(num_sequences, splits, page_size, num_kv_heads, num_q_heads // num_kv_heads, head_dim),
        *(q.stride(0), block_tables.stride(0), scale, torch.get_num_threads()),
    )
    return out


def _usable(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == torch.bfloat16
        and os.environ.get("QWENKERN_KERNELS") != "reference"
        and _library() is not None
    )


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled functions."""
    try:
        library = ctypes.CDLL(str(_build()))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or error
        warnings.warn(
            f"qwenkern: no C compiler could build {_SOURCE.name}, so torch runs it, slower: {said}", stacklevel=2
        )
        return None
    pointer, size, scalar, number = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_int
    library.few_tokens.argtypes = [pointer] * 10 + [size] * 7 + [scalar, number, number]
    library.rope_and_cache.argtypes = [pointer] * 7 + [size] * 5
    library.decode_attention.argtypes = [pointer] * 7 + [size] * 8 + [scalar, number]
    for function in (library.few_tokens, library.rope_and_cache, library.decode_attention):
        function.restype = None
    return library


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
