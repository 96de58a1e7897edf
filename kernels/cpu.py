"""A decode step's ops on a CPU: cpu.c, compiled by the machine's own compiler at the first use and kept.

torch reads bfloat16 weights for one token at half of the memory's bandwidth; this reads them at what the memory gives,
for a few tokens at once, without a second copy of them. Where no C compiler works, a warning says so once and the
torch twin runs. A Tape is to these ops what a CUDA graph is to kernels: it plays a whole step in one call.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

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
    strides = (0 if t is None else t.stride(0) for t in (x, residual, weight, addend))
    _run(
        "few_tokens",
        (out, new_residual, rows, x, residual, norm_weight, weight, up, bias, addend),
        (num_tokens, n, k, *strides, out_dtype == torch.float32),
        eps,
    )
    return out, x if new_residual is None else new_residual


def takes_rows(weight: Tensor) -> bool:
    return weight.stride(1) == 1 and _usable(weight)


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """Rows [T, K] of weight [V, K]."""
    out = weight.new_empty(len(ids), weight.shape[1])
    _run("embedding", (out, weight, ids.long().contiguous()), (*out.shape, weight.stride(0)))
    return out


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
    _run(
        "rope_and_cache",
        (q, k_pages, v_pages, qkv, positions.long().contiguous(), slots.long().contiguous(), cos_sin),
        (len(qkv), q.shape[1], num_kv_heads, head_dim, qkv.stride(0)),
    )
    return q


def decode_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, block_tables: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    """As the public op. The cache is read where it lies."""
    q = q if q.stride(1) == q.shape[2] else q.contiguous()
    (num_sequences, num_q_heads, head_dim), (_, page_size, num_kv_heads, _) = q.shape, k_pages.shape
    splits = -(-block_tables.shape[1] * page_size // SPLIT)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    _run(
        "decode_attention",
        (
            *(out, _scratch(num_sequences * num_q_heads * splits * (head_dim + 2)), q, k_pages, v_pages),
            *(block_tables.int().contiguous(), lengths.int().contiguous()),
        ),
        (
            *(num_sequences, splits, page_size, num_kv_heads, num_q_heads // num_kv_heads, head_dim),
            *(q.stride(0), block_tables.stride(0)),
        ),
        scale,
    )
    return out


class NotRecordable(RuntimeError):
    """What ran under Tape.record is more than calls of cpu.c."""


class Tape:
    """The calls of cpu.c that a function makes, recorded once and played in one go: no Python, no allocation, and one
    team of threads from the first to the last. It works on the memory that its tensors had when it was recorded."""

    def __init__(self) -> None:
        self._calls: list[_Call] = []
        self._kept: list[Tensor | None] = []
        self._scratch = torch.empty(0)
        self._threads = torch.get_num_threads()

    @contextlib.contextmanager
    def record(self) -> Iterator[None]:
        """Records what runs within it, without running it. Raises NotRecordable if torch were to compute something."""
        _recording.tape = self
        try:
            with _OnlyViews():
                yield
        finally:
            _recording.tape = None
        self._packed = (_Call * len(self._calls))(*self._calls)

    def replay(self) -> None:
        _library().run(self._packed, len(self._packed), self._threads)

    def add(self, call: _Call, tensors: Sequence[Tensor | None]) -> None:
        self._calls.append(call)
        self._kept += tensors

    def scratch(self, size: int) -> Tensor:
        """Memory that one call uses for itself."""
        if self._scratch.numel() < size:
            self._scratch = torch.empty(size)
        return self._scratch


class _OnlyViews(TorchDispatchMode):
    """Lets torch make tensors and views of them, but compute nothing."""

    allowed = ("empty", "new_empty", "empty_like", "empty_strided")

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not function.is_view and function._schema.name.removeprefix("aten::") not in self.allowed:
            raise NotRecordable(f"{function.name()} is not a call of {_SOURCE.name}")
        return function(*args, **(kwargs or {}))


class _Call(ctypes.Structure):
    _fields_ = (
        ("op", ctypes.c_long),
        ("tensors", ctypes.c_void_p * 10),
        ("sizes", ctypes.c_long * 8),
        ("scalar", ctypes.c_double),
    )


_OPS = ("embedding", "few_tokens", "rope_and_cache", "decode_attention")
_recording = threading.local()


def _run(op: str, tensors: Sequence[Tensor | None], sizes: Sequence[int], scalar: float = 0.0) -> None:
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    call = _Call(_OPS.index(op), (ctypes.c_void_p * 10)(*pointers), (ctypes.c_long * 8)(*sizes), scalar)
    tape = getattr(_recording, "tape", None)
    if tape is None:
        _library().run(ctypes.byref(call), 1, torch.get_num_threads())
    else:
        tape.add(call, tensors)


def is_recording() -> bool:
    return getattr(_recording, "tape", None) is not None


def _scratch(size: int) -> Tensor:
    tape = getattr(_recording, "tape", None)
    return torch.empty(size) if tape is None else tape.scratch(size)


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
    library.run.argtypes = (ctypes.c_void_p, ctypes.c_long, ctypes.c_int)
    library.run.restype = None
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
