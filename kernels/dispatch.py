"""Chooses the backend that runs an op.

A backend registers implementations of ops (``Backend.implements``). Each implementation has a function ``refuses`` of
the same arguments; it returns the reason why the implementation cannot run them, or None. Backends are tried in the
order of their registration (see __init__.py), and the first that does not refuse runs the op. If all of them refuse,
the reference of the contract runs (contract.py).

QWENKERN_KERNELS=reference chooses the reference everywhere. If a GPU runs the reference for another reason, a warning
gives that reason once.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from .environment import KERNELS
from .recording import CannotRecord, is_recording
from .weights import Weight

P = ParamSpec("P")
R_co = TypeVar("R_co", covariant=True)
Refuses = Callable[..., "str | None"]


class Op(Protocol[P, R_co]):
    """The public function of an op.

    ``reference`` is the contract's own torch code, with its checks. ``wrap`` converts arguments to what backends get:
    tensors become Weight and Pages values."""

    __name__: str
    reference: Callable[..., Any]
    wrap: Callable[[tuple, dict[str, Any]], tuple[tuple, dict[str, Any]]]
    has_gradient: bool

    def __call__(self, *args: P.args, **keywords: P.kwargs) -> R_co: ...


@dataclass(frozen=True)
class Implementation:
    backend: Backend
    run: Callable[..., Any]
    refuses: Refuses


@dataclass
class Backend:
    """The kernels for some types of device.

    ``serves(kind)`` says whether the backend runs on a type of device ("cuda", "cpu", "meta"). ``refuses(x)`` gets an
    op's first tensor; it returns the reason why no op of this backend takes that tensor, or None. ``prepare`` returns
    the reason why the backend cannot run here, or None. Its first call may compile, measure and write to the log; later
    calls cost nothing. ``refuses`` must do none of these. ``invariant_tokens`` returns the largest number of tokens in
    one call for which linears are batch-invariant: the other tokens do not change a token's bits. ``is_recorded`` says
    whether calls of this backend on a CPU can be recorded and replayed (c/recorded_calls.py). A call of another backend
    ends the recording with CannotRecord."""

    name: str
    serves: Callable[[str], bool]
    refuses: Callable[[Tensor], str | None]
    prepare: Callable[[], str | None] = lambda: None
    invariant_tokens: Callable[[], int] = lambda: 1
    is_recorded: bool = False
    implementations: dict[str, Implementation] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name in [other.name for other in BACKENDS]:
            raise ValueError(f"there are two backends {self.name!r}; expected a name of its own for each")
        BACKENDS.append(self)

    def implements(self, refuses: Refuses | None = None) -> Callable[[Callable], Callable]:
        """Registers the decorated function as this backend's implementation of the op with the same name.

        The function and ``refuses`` get the op's arguments after the checks, with weights and pages as values. Raises
        ValueError for an unknown op, a second implementation, or other arguments than those of the contract."""

        def register(function: Callable) -> Callable:
            name = function.__name__
            if name not in OPS:
                raise ValueError(
                    f"backend {self.name} implements {name}, and there is no such op among {', '.join(OPS)}; expected "
                    "its contract to be imported first, in kernels/__init__.py"
                )
            if name in self.implementations:
                raise ValueError(f"backend {self.name} implements {name} twice")
            theirs, mine = (list(inspect.signature(each).parameters) for each in (OPS[name], function))
            if theirs != mine:
                raise ValueError(f"backend {self.name}'s {name} has the arguments {mine}; expected {theirs}")
            if refuses is not None and not _takes(refuses, theirs):
                raise ValueError(f"backend {self.name}'s refusal of {name} does not take the op's arguments {theirs}")
            self.implementations[name] = Implementation(self, function, refuses or _takes_all)
            return function

        return register


BACKENDS: list[Backend] = []  # dispatch tries them in this order
OPS: dict[str, Op[..., Any]] = {}


def _takes(function: Callable, names: list[str]) -> bool:
    """Whether a function can be called with arguments of these names, both by position and by keyword."""
    try:
        inspect.signature(function).bind(*names)
        inspect.signature(function).bind(names[0], **dict.fromkeys(names[1:]))
    except TypeError:
        return False
    return True


def _takes_all(*args: Any, **keywords: Any) -> None:
    return None


def serving(name: str, first: Tensor, *args: Any, **keywords: Any) -> Implementation | None:
    """The implementation that runs an op with these arguments, which have passed the checks, or None if the reference
    runs. The device and dtype of ``first`` decide which backends are asked."""
    kind = first.device.type
    refusal: str | None = None
    for backend in backends(kind):
        implementation = backend.implementations.get(name)
        if implementation is None:
            continue
        refusal = backend.refuses(first)
        if refusal is None:
            if backend.prepare() is not None:
                continue
            refusal = implementation.refuses(*args, **keywords)
        if refusal is None:
            if kind == "cpu" and not backend.is_recorded and is_recording():
                raise CannotRecord(f"{name} runs in {backend.name}, whose calls are not recorded")
            return implementation
    if kind == "cuda" and first.numel():
        _warn_of_reference(refusal)
    return None


def refusals(name: str, first: Tensor, *args: Any) -> dict[str, str | None]:
    """For each backend, by name: the reason why it does not run an op with these arguments, or None if it would run
    them. The first backend with None runs the op. If no backend has None, the torch reference runs."""
    kind = first.device.type
    found: dict[str, str | None] = {}
    args, _ = OPS[name].wrap(args, {})
    chosen = backends(kind)
    for backend in BACKENDS:
        implementation = backend.implementations.get(name)
        if implementation is None:
            found[backend.name] = "has no such kernel"
        elif backend not in chosen:
            chosen_away = KERNELS.get() == "reference"
            found[backend.name] = "QWENKERN_KERNELS=reference" if chosen_away else f"does not run on {kind}"
        else:
            reason = backend.refuses(first) or backend.prepare() or implementation.refuses(*args)
            found[backend.name] = reason and f"does not take {reason}"
    return found


def backends(kind: str) -> list[Backend]:
    """The backends for a type of device, in the order in which dispatch tries them."""
    return [] if KERNELS.get() == "reference" else [backend for backend in BACKENDS if backend.serves(kind)]


def prepare(device: torch.device, dtype: torch.dtype) -> None:
    """Prepares the backends that take tensors of this device and dtype. Otherwise the first call of an op prepares
    them. Preparing may take seconds, once on a machine, and a log line says so."""
    example = torch.empty(1, dtype=dtype, device=device)
    for backend in backends(device.type):
        if backend.refuses(example) is None:
            backend.prepare()


def is_served(kind: str) -> bool:
    """Whether any backend runs on a type of device."""
    return any(backend.serves(kind) for backend in BACKENDS)


def invariant_tokens(weights: Iterable[Weight]) -> int:
    """The largest number of tokens in one call for which linears with these weights are batch-invariant: the other
    tokens do not change a token's bits. 1 if torch runs one of the linears."""
    different = {(weight.format, weight.dtype, weight.shape): weight for weight in weights}
    found = []
    for weight in different.values():
        x = torch.empty((1, weight.shape[1]), dtype=weight.dtype, device=weight.device)
        implementation = serving("linear", x, x, weight)
        found.append(implementation.backend.invariant_tokens() if implementation else 1)
    return min(found, default=1)


def _warn_of_reference(refusal: str | None) -> None:
    """Warns that a GPU runs the torch reference, unless QWENKERN_KERNELS asks for it."""
    if KERNELS.get() == "reference":
        return
    if not is_served("cuda"):
        refusal = "anything, for Triton is not installed"
    if refusal is not None:
        _warn_once(refusal)


@functools.cache
def _warn_once(refusal: str) -> None:
    warnings.warn(f"qwenkern: the Triton kernel does not take {refusal}; torch runs it, slower", stacklevel=6)


_dependent = threading.local()
Kept = dict[Any, Tensor]  # a kernel chooses the keys of its own tensors


@contextlib.contextmanager
def dependent_launches(kept: Kept | None = None, on: bool = True) -> Iterator[None]:
    """In this context kernels are launched with programmatic dependent launch, or without it (``on=False``). Elsewhere
    they are launched with it inside a captured graph only. The warm-up run before a capture uses it, so the capture
    itself compiles and loads nothing.

    Kernels store in ``kept`` the tensors that their later launches use again. The caller keeps it for as long as the
    graph, and never replays two graphs with the same ``kept`` at once. Without it each call allocates its own.

    The caller promises that no kernel in this context writes the block tables or the lengths of attention, so that
    they may be read while earlier kernels run."""
    before = launches_dependently(), kept_tensors()
    _dependent.on, _dependent.kept = on, kept
    try:
        yield
    finally:
        _dependent.on, _dependent.kept = before


def launches_dependently() -> bool | None:
    """Whether kernels are launched with programmatic dependent launch; None if only those in a captured graph are."""
    return getattr(_dependent, "on", None)


def kept_tensors() -> Kept | None:
    """The tensors that the caller of ``dependent_launches`` keeps, or None."""
    return getattr(_dependent, "kept", None)
