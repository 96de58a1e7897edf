"""Which implementation an op runs on, and its registration with torch.library.

The rule: CUDA tensors run on Triton; bfloat16 tensors on a CPU in C (cpu/), others there on the torch reference in
reference.py; or on Triton's interpreter, all of them, where TRITON_INTERPRET=1 was set when Triton was imported.
QWENKERN_KERNELS=reference chooses the reference everywhere. float64, and sizes that a kernel does not take, run on it,
too; on a GPU a warning says so once.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from . import tuning

INTERPRETED = triton.knobs.runtime.interpret


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
            first = args[0] if args else None
            if torch.autograd.forward_ad._current_level >= 0:
                _refuse_tangents(name, (*args, *keywords.values()))
            if torch.compiler.is_compiling() or _wants_gradient(args, keywords) or _is_watched(first):
                return getattr(torch.ops.qwenkern, name)(*args, **keywords)
            if isinstance(first, Tensor) and first.is_cuda and first.device.index != torch.cuda.current_device():
                with torch.cuda.device(first.device):  # Triton launches on the current device
                    return function(*args, **keywords)
            return function(*args, **keywords)

        public.has_gradient = gradient is not None
        return public

    return register


def _wants_gradient(args: tuple[Any, ...], keywords: dict[str, Any]) -> bool:
    return torch.is_grad_enabled() and any(
        isinstance(each, Tensor) and each.requires_grad for each in (*args, *keywords.values())
    )


def _is_watched(x: Any) -> bool:
    """Whether torch follows what happens to x (tracing, vmap), or x has no memory, or is negated when it is read: a
    launcher's work, which torch does not see, would be missing or wrong."""
    return (
        (isinstance(x, Tensor) and (type(x) not in (Tensor, torch.nn.Parameter) or x.is_neg()))
        or torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
    )


def _refuse_tangents(name: str, args: tuple[Any, ...]) -> None:
    """Raises where a forward-mode derivative would silently be lost."""
    for each in args:
        if isinstance(each, Tensor) and torch.autograd.forward_ad.unpack_dual(each).tangent is not None:
            raise NotImplementedError(f"{name} has no forward-mode derivative; expected tensors without tangents")


def runs_on_triton(x: Tensor, unsupported: str | None = None) -> bool:
    """Whether the op on x runs on its kernel. ``unsupported`` says what of it the kernel does not take, if anything."""
    choice = os.environ.get("QWENKERN_KERNELS", "triton")
    if choice not in ("triton", "reference"):
        raise ValueError(f"QWENKERN_KERNELS must be triton or reference, and is {choice!r}")
    if choice == "reference" or not (x.is_cuda or tuning.is_offline() or (INTERPRETED and x.device.type == "cpu")):
        return False
    if x.dtype == torch.float64 or not x.numel():  # nothing to launch
        return False
    if unsupported and x.is_cuda:
        _warn_once(unsupported)
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
