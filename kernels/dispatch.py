"""Which implementation an op runs on, and its registration with torch.library.

The rule: CUDA tensors run on Triton; bfloat16 tensors on a CPU in C (c/), others there on the torch reference in
reference.py; or on Triton's interpreter, all of them, where TRITON_INTERPRET=1 was set when Triton was imported.
QWENKERN_KERNELS=reference chooses the reference everywhere. float64, and sizes that a kernel does not take, run on it,
too; on a GPU a warning says so once.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from . import tuning
from .environment import KERNELS
from .triton_if_any import INSTALLED, INTERPRETED, ensure_cache


def op(
    fake: Callable, mutates: tuple[str, ...] = (), gradient: tuple[Callable, Callable] | None = None
) -> Callable[[Callable], Callable]:
    """Registers the decorated function as torch.ops.qwenkern.<its name>, for torch.compile and other projects.

    ``gradient`` is what torch.library.register_autograd takes: setup_context(ctx, inputs, output) and backward(ctx,
    *gradients of the outputs). Without one, a backward pass through the op raises.

    In eager mode without gradients it is called directly: the way through torch's dispatcher costs tens of microseconds
    a call."""

    def register(function: Callable) -> Callable:
        name = function.__name__
        if not hasattr(torch.ops.qwenkern, name):  # a second copy of this folder leaves the first one's ops alone
            custom = torch.library.custom_op(f"qwenkern::{name}", _for_library(function), mutates_args=mutates)
            custom.register_fake(fake)
            if gradient:
                custom.register_autograd(gradient[1], setup_context=gradient[0])

        @functools.wraps(function)
        def public(*args: Any, **keywords: Any) -> Any:
            given = (*args, *keywords.values()) if keywords else args
            if torch.autograd.forward_ad._current_level >= 0:
                _refuse_tangents(name, given)
            if torch.compiler.is_compiling() or _is_traced():
                return getattr(torch.ops.qwenkern, name)(*args, **keywords)
            if _is_for_torch(given):
                _refuse_negated(function, mutates, args, keywords)
                return getattr(torch.ops.qwenkern, name)(*args, **keywords)
            first = given[0] if given and isinstance(given[0], Tensor) else _first_tensor(given)
            if first is None or first.is_cpu:
                return function(*args, **keywords)
            if first.is_meta and not tuning.is_offline():  # shapes alone, where all are; else the op says which is not
                alone = all(each.is_meta for each in given if isinstance(each, Tensor))
                return (getattr(torch.ops.qwenkern, name) if alone else function)(*args, **keywords)
            if first.is_cuda and first.device.index != torch.cuda.current_device():
                with torch.cuda.device(first.device):  # Triton launches on the current device
                    return function(*args, **keywords)
            return function(*args, **keywords)

        public.has_gradient = gradient is not None
        return public

    return register


def _is_for_torch(given: Iterable[Any]) -> bool:
    """Whether torch must see an argument itself: it wants a gradient, or is a subclass, which may have no memory of
    its own (DTensor, torchao's), or is negated when it is read. A launcher would not know."""
    wants_gradient = torch.is_grad_enabled()
    for each in given:
        kind = type(each)
        if kind is Tensor or kind is Parameter:
            if each.is_neg() or (wants_gradient and each.requires_grad):
                return True
        elif isinstance(each, Tensor):
            return True
    return False


def _is_traced() -> bool:
    """Whether torch follows what happens: a launcher's work, which it does not see, would be missing."""
    return (
        torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
    )


def _first_tensor(given: Iterable[Any]) -> Tensor | None:
    return next((each for each in given if isinstance(each, Tensor)), None)


def _refuse_negated(
    function: Callable, names: tuple[str, ...], args: tuple[Any, ...], keywords: dict[str, Any]
) -> None:
    """Raises where an argument to be written to is negated when it is read: torch has no way to write to it."""
    if names:
        given = inspect.signature(function).bind(*args, **keywords).arguments
        for each in names:
            if isinstance(given[each], Tensor) and given[each].is_neg():
                raise ValueError(
                    f"{function.__name__}: {each} is written to, and is a negated view; expected a plain one"
                )


def _refuse_tangents(name: str, args: tuple[Any, ...]) -> None:
    """Raises where a forward-mode derivative would silently be lost."""
    for each in args:
        if isinstance(each, Tensor) and torch.autograd.forward_ad.unpack_dual(each).tangent is not None:
            raise NotImplementedError(f"{name} has no forward-mode derivative; expected tensors without tangents")


def runs_on_triton(x: Tensor, unsupported: str | None = None) -> bool:
    """Whether the op on x runs on its kernel. ``unsupported`` says what of it the kernel does not take, if anything."""
    if KERNELS.get() == "reference" or not (
        x.is_cuda or tuning.is_offline() or (INTERPRETED and x.device.type == "cpu")
    ):
        return False
    if x.dtype == torch.float64 or not x.numel():  # nothing to launch
        return False
    if not INSTALLED:
        unsupported = "anything, for Triton is not installed"
    if unsupported and x.is_cuda:
        _warn_once(unsupported)
    if not (unsupported or INTERPRETED):
        ensure_cache()
    return not unsupported


_dependent = threading.local()


@contextlib.contextmanager
def dependent_launches() -> Iterator[None]:
    """While it lasts, kernels are launched as in a captured graph: for what runs once before it is captured, so that
    nothing is compiled or loaded while it is."""
    before, _dependent.on = getattr(_dependent, "on", False), True
    try:
        yield
    finally:
        _dependent.on = before


def pdl_options(x: Tensor) -> dict[str, bool]:
    """Launch options for programmatic dependent launch: on from sm_90, and only inside a captured graph, because an
    eager launch pays for it on the host."""
    device = tuning.device_of(x)
    if INTERPRETED or device.backend != "cuda" or device.capability < 90:
        return {"PDL": False}
    if not (tuning.is_offline() or getattr(_dependent, "on", False) or torch.cuda.is_current_stream_capturing()):
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}


@functools.cache
def _warn_once(unsupported: str) -> None:
    warnings.warn(f"qwenkern: the Triton kernel does not take {unsupported}; torch runs it, slower", stacklevel=3)


def _for_library(function: Callable) -> Callable:
    """torch.library wants outputs that are not inputs (a stream that begins with x returns x as its residual), and that
    lie as the fakes say: densely, where a twin keeps the order of its input's dimensions."""

    @functools.wraps(function)
    def call(*args: Any, **keywords: Any) -> Any:
        outputs = function(*args, **keywords)
        if not isinstance(outputs, tuple):
            return outputs.contiguous()
        return tuple(
            out.clone(memory_format=torch.contiguous_format) if any(out is arg for arg in args) else out.contiguous()
            for out in outputs
        )

    return call
