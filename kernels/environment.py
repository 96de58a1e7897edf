"""Every QWENKERN_* environment variable, with its meaning, its default and its parser. Also the folder of caches.

A variable is read each time it is used, never at import. An empty value counts as unset. The table in
docs/environment.md has the same rows, and a test compares the two.

This file lies in kernels/, the lowest package, because the ops read variables too. It imports nothing from the packages
above, because Hugging Face's `kernels` library loads this folder under a name of its own. It imports only the standard
library, because setup.py loads it before anything is installed."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")
MOST_THREADS = 1024  # a larger number is refused as a mistake: each thread costs memory


@dataclass(frozen=True)
class Variable(Generic[T]):
    """An environment variable. ``parse`` gets its name and its text, which is not empty, and returns the value. It may
    raise ValueError."""

    name: str
    meaning: str
    default: str  # what happens while it is unset, in words
    parse: Callable[[str, str], T]

    def get(self) -> T | None:
        """Its present value, or None if it is unset. Raises ValueError, which names the variable, if the text is
        invalid."""
        text = os.environ.get(self.name)
        return self.parse(self.name, text) if text else None


def _text(name: str, text: str) -> str:
    return text


def _is_one(name: str, text: str) -> bool:
    return text == "1"


@functools.cache
def _threads(name: str, text: str) -> int:
    if not text.strip().isdecimal() or not 1 <= int(text) <= MOST_THREADS:
        raise ValueError(f"{name} is {text!r}; expected a whole number from 1 to {MOST_THREADS}, or unset")
    return int(text)


def _kernels(name: str, text: str) -> str:
    if text not in ("triton", "reference"):
        raise ValueError(f"{name} is {text!r}; expected triton or reference, or unset")
    return text


def _activations(name: str, text: str) -> str:
    if text not in ("exact", "int8"):
        raise ValueError(f"{name} is {text!r}; expected exact or int8, or unset")
    return text


CACHE = Variable(
    "QWENKERN_CACHE",
    "The folder for downloads (`models/`), and for compiled C functions and their measurements (`compiled/`). The path "
    "may begin with `~`, or be relative to the current folder",
    "`$XDG_CACHE_HOME/qwenkern` if `XDG_CACHE_HOME` is an absolute path, else `~/.cache/qwenkern`",
    _text,
)
THREADS = Variable(
    "QWENKERN_THREADS",
    "The number of CPU threads, from 1 to 1024. `threads=` of a model and `--threads` override it",
    "one thread for each physical core that the process may run on, but not more than the cgroup's CPU quota (rounded "
    "up) or `torch.get_num_threads()`",
    _threads,
)
CPU_ACTIVATIONS = Variable(
    "QWENKERN_CPU_ACTIVATIONS",
    "The precision of activations in products with quantised weights on a CPU. `exact` splits them into two planes of "
    "int8, which is finer than bfloat16. `int8` rounds them to one plane, which is faster for many tokens, and less "
    "exact",
    "`exact`",
    _activations,
)
CPU_TARGET = Variable(
    "QWENKERN_CPU_TARGET",
    "The target of the C functions: `x86-64-v3`, `x86-64-v3-vnni`, `x86-64-v4`, `x86-64-v4-vnni`, `x86-64-v4-bf16`, "
    "`armv8.2-dotprod`, `armv8.6-bf16` or `native`",
    "the best one for the processor",
    _text,  # the C backend checks whether this processor has the target
)
KERNELS = Variable(
    "QWENKERN_KERNELS",
    "`reference` runs every op in torch, without Triton or C. `triton` runs the kernels: Triton on a GPU, C on a CPU",
    "`triton`",
    _kernels,
)
CONFIG_DIR = Variable(
    "QWENKERN_CONFIG_DIR",
    "A folder of tuned launch configurations. The kernels look there before they use the configurations in the "
    "package. `qwenkern tune` writes there, unless `--out` names another folder",
    "only the configurations in the package",
    _text,
)
FOLLOW_LINKS = Variable(
    "QWENKERN_FOLLOW_LINKS",
    "`1` follows links that lead out of a checkpoint's folder",
    "such a link is an error",
    _is_one,
)
REQUIRE_C = Variable(
    "QWENKERN_REQUIRE_C",
    "`1` makes it an error to build a package without C functions",
    "a warning",
    _is_one,
)
API_KEY = Variable(
    "QWENKERN_API_KEY",
    "A key that clients of `qwenkern serve` may send, beside those of `--api-key-file`",
    "only the keys of `--api-key-file`; without any key, everybody may call",
    _text,
)
LLAMA_CPP = Variable(
    "QWENKERN_LLAMA_CPP",
    "The folder of llama.cpp's programs, for `benchmarks/end_to_end.py`",
    "the folders of `PATH`",
    _text,
)
COMMIT = Variable(
    "QWENKERN_COMMIT",
    "The commit named in benchmark results, for a checkout without `.git`",
    "what `git describe` says",
    _text,
)

VARIABLES: tuple[Variable, ...] = (
    CACHE,
    THREADS,
    CPU_ACTIVATIONS,
    CPU_TARGET,
    KERNELS,
    CONFIG_DIR,
    FOLLOW_LINKS,
    REQUIRE_C,
    API_KEY,
    LLAMA_CPP,
    COMMIT,
)


def cache_folder() -> Path:
    """The folder of caches that the variables name. The path may be relative, and may begin with ``~``. XDG_CACHE_HOME
    counts only if it is absolute, as the XDG specification demands."""
    shared = os.environ.get("XDG_CACHE_HOME", "")
    return Path(CACHE.get() or Path(shared if os.path.isabs(shared) else "~/.cache", "qwenkern"))
