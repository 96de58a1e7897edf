"""Which backend runs an op.

A backend registers implementations of ops (``Backend.implements``), each with a function of the same arguments that
says why it refuses them, or None. The first backend of the device that does not refuse runs, in the order of their
registration (see __init__.py), or else the reference of the contract (contract.py).

QWENKERN_KERNELS=reference chooses the reference everywhere. Where a GPU runs the reference, a warning says why, once.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from .environment import KERNELS
from .recording import CannotRecord, is_recording

P = ParamSpec("P")
R_co = TypeVar("R_co", covariant=True)
Refuses = Callable[..., "str | None"]


class Op(Protocol[P, R_co]):
    """An op as it is called.

    ``reference`` is the contract's own torch code, checks included. ``wrap`` gives arguments as backends get them, with
    weights and pages as values."""

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
    """Kernels for the tensors of some devices.

    ``serves`` says whether the backend is there for a type of device ("cuda", "cpu", "meta"). ``refuses`` says of an
    op's first tensor why no op of this backend takes it, or None. ``prepare`` makes the backend ready: it may compile,
    measure and write to the log the first time, costs nothing later, and returns None or why the backend cannot run
    here. No ``refuses`` may do any of this. ``invariant_tokens`` returns the number of tokens up to which the bits that
    a linear gives a token do not depend on the other tokens. ``is_recorded`` says whether its calls on a CPU can be
    recorded and made again (c/recorded_calls.py); others end the recording."""

    name: str
    serves: Callable[[str], bool]
    refuses: Callable[[Tensor], str | None]
    prepare: Callable[[], str | None] = lambda: None
    invariant_tokens: Callable[[], int] = lambda: 1
    is_recorded: bool = False
    implementations: dict[str, Implementation] = field(default_factory=dict)

    def __post_init__(self) -> None:
        BACKENDS.append(self)

    def implements(self, refuses: Refuses | None = None) -> Callable[[Callable], Callable]:
        """Registers the decorated function as this backend's implementation of the op of its name.

        It and ``refuses`` get the op's arguments, checked, with weights and pages as values."""

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
            self.implementations[name] = Implementation(self, function, refuses or _takes_all)
            return function

        return register


BACKENDS: list[Backend] = []  # in the order in which they are tried
OPS: dict[str, Op[..., Any]] = {}


def _takes_all(*args: Any, **keywords: Any) -> None:
    return None


def serving(name: str, first: Tensor, *args: Any, **keywords: Any) -> Implementation | None:
    """The implementation that runs an op with these arguments, which are checked; None: its reference does. ``first``
    is the tensor whose device and dtype decide."""
    kind = first.device.type
    refusal: str | None = None
    for backend in backends(kind):
        implementation = backend.implementations.get(name)
        if implementation is None or backend.refuses(first) is not None or backend.prepare() is not None:
            continue
        refusal = implementation.refuses(*args, **keywords)
        if refusal is None:
            if kind == "cpu" and not backend.is_recorded and is_recording():
                raise CannotRecord(f"{name} runs in {backend.name}, whose calls are not recorded")
            return implementation
    if kind == "cuda":
        _warn_of_reference(refusal)
    return None


def refusals(name: str, first: Tensor, *args: Any) -> dict[str, str | None]:
    """Of each backend, by its name, why it does not run an op with these arguments; None where it would. The first of
    those runs it, and where there is none torch does."""
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
    """Those for a type of device, in the order in which they are tried."""
    return [] if KERNELS.get() == "reference" else [backend for backend in BACKENDS if backend.serves(kind)]


def prepare(device: torch.device, dtype: torch.dtype) -> None:
    """Prepares the backends that take tensors of this kind, which else happens at the first call of an op. It may take
    seconds, once on a machine, and the log says so."""
    example = torch.empty(1, dtype=dtype, device=device)
    for backend in backends(device.type):
        if backend.refuses(example) is None:
            backend.prepare()


def is_served(kind: str) -> bool:
    """Whether any backend is there for a type of device."""
    return any(backend.serves(kind) for backend in BACKENDS)


def invariant_tokens(weight: Tensor) -> int:
    """The number of tokens up to which the bits that linears with such weights give a token do not depend on the other
    tokens of the call."""
    for backend in backends(weight.device.type):
        if backend.refuses(weight) is None and backend.prepare() is None:
            return backend.invariant_tokens()
    return 1


def _warn_of_reference(refusal: str | None) -> None:
    """That a GPU runs torch's own kernels, where that is not what somebody chose."""
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


@contextlib.contextmanager
def dependent_launches() -> Iterator[None]:
    """While it lasts, kernels are launched as in a captured graph: for what runs once before it is captured, so that
    nothing is compiled or loaded while it is."""
    before, _dependent.on = launches_dependently(), True
    try:
        yield
    finally:
        _dependent.on = before


def launches_dependently() -> bool:
    return getattr(_dependent, "on", False)
