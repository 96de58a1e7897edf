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

from torch import Tensor

from .environment import KERNELS

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

    ``serves`` says whether it is there for a type of device ("cuda", "cpu", "meta"). ``refuses`` says of an op's first
    tensor why no op of this backend takes it, or None. ``prepare`` is called once before the first of these: it may
    compile, measure or write to the log, and ``refuses`` may not. ``invariant_tokens`` is the number of tokens up to
    which the bits that a linear gives a token do not depend on the other tokens."""

    name: str
    serves: Callable[[str], bool]
    refuses: Callable[[Tensor], str | None]
    prepare: Callable[[], None] = lambda: None
    invariant_tokens: int = 1
    implementations: dict[str, Implementation] = field(default_factory=dict)
    is_prepared: bool = False

    def __post_init__(self) -> None:
        BACKENDS.append(self)

    def implements(self, refuses: Refuses | None = None) -> Callable[[Callable], Callable]:
        """Registers the decorated function as this backend's implementation of the op of its name.

        It and ``refuses`` get the op's arguments, checked, with weights and pages as values."""

        def register(function: Callable) -> Callable:
            name = function.__name__
            if name not in OPS:
                raise ValueError(
                    f"backend {self.name} implements {name}, and there is no such op among {', '.join(OPS)}"
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
        if implementation is not None and backend.refuses(first) is None:
            refusal = implementation.refuses(*args, **keywords)
            if refusal is None:
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
            reason = backend.refuses(first) or implementation.refuses(*args)
            found[backend.name] = reason and f"does not take {reason}"
    return found


def backends(kind: str) -> list[Backend]:
    """Those for a type of device, prepared, in the order in which they are tried."""
    if KERNELS.get() == "reference":
        return []
    found = [backend for backend in BACKENDS if backend.serves(kind)]
    for backend in found:
        if not backend.is_prepared:
            backend.prepare()
            backend.is_prepared = True
    return found


def is_served(kind: str) -> bool:
    """Whether any backend is there for a type of device."""
    return any(backend.serves(kind) for backend in BACKENDS)


def invariant_tokens(weight: Tensor) -> int:
    """The number of tokens up to which the bits that linears with such weights give a token do not depend on the other
    tokens of the call."""
    return next((each.invariant_tokens for each in backends(weight.device.type) if each.refuses(weight) is None), 1)


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
