"""Contracts: what an op is, written once.

    @op()
    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Steps[Tensor]:
        "What users read: formula, shapes, dtypes, roundings, source."
        check_tensor("rms_norm", "x", x, ("...", "H"))   # checks, which raise
        yield                                            # here an implementation of a backend runs (dispatch.py), or
        return ...                                       # the rest, which is the torch reference

``op`` makes the public function of it, and registers it as torch.ops.qwenkern.<its name> for torch.compile and
others. Eager calls without gradients go past torch's dispatcher, which costs tens of microseconds a call.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from .dispatch import OPS, Op, is_served, serving
from .pages import Pages, as_pages
from .weights import Weight, as_weight

P = ParamSpec("P")
R = TypeVar("R")
Steps = Generator[None, None, R]  # what the body of a contract is: checks, a yield, the reference
Gradient = tuple[Callable[..., None], Callable[..., Any]]  # setup_context and backward, as register_autograd takes them


def op(
    *, fake: Callable | None = None, mutates: tuple[str, ...] = (), gradient: Gradient | None = None
) -> Callable[[Callable[P, Steps[R]]], Op[P, R]]:
    """Makes an op of a contract.

    ``fake`` gives results of the right shapes; by default the contract's own code does, on torch's fake tensors, which
    it cannot where it looks at values. ``mutates`` names the arguments that are written to. ``gradient`` is what
    torch.library.register_autograd takes; without one, a backward pass through the op raises.

    In torch.ops a Weight is a list of its tensors, and a keyword ``<name>_format`` says which format they have; Pages
    likewise."""

    def register(body: Callable[P, Steps[R]]) -> Op[P, R]:
        name = body.__name__
        values = _Values(body)

        def reference(*args: Any, **keywords: Any) -> Any:
            args, keywords = values.wrap(args, keywords)
            steps = body(*args, **keywords)
            next(steps)
            return _rest(steps)

        def eager(*args: Any, **keywords: Any) -> Any:
            steps = body(*args, **keywords)
            next(steps)  # the checks
            first = args[0] if args else next(_tensors(keywords.values()))
            found = serving(name, first, *args, **keywords)
            return _rest(steps) if found is None else found.run(*args, **keywords)

        if not hasattr(torch.ops.qwenkern, name):  # a second copy of this folder leaves the first one's ops as they are
            _register_with_torch(body, values, eager, fake or reference, mutates, gradient)

        @functools.wraps(body)
        def public(*args: Any, **keywords: Any) -> Any:
            if values.places:
                args, keywords = values.wrap(args, keywords)
            given = (*args, *keywords.values()) if keywords else args
            if torch.autograd.forward_ad._current_level >= 0:
                _refuse_tangents(name, given)
            if torch.compiler.is_compiling() or _is_traced():
                return values.call_torch(name, args, keywords)
            if _is_for_torch(given):
                _refuse_negated(body, mutates, args, keywords)
                return values.call_torch(name, args, keywords)
            first = given[0] if given and isinstance(given[0], Tensor) else _first_tensor(given)
            if first is None or first.is_cpu:
                return eager(*args, **keywords)
            if first.is_meta and not is_served("meta"):
                shapes_only = all(each.is_meta for each in _tensors(given))  # else the checks say which is not
                return values.call_torch(name, args, keywords) if shapes_only else eager(*args, **keywords)
            if first.is_cuda and first.device.index != torch.cuda.current_device():
                with torch.cuda.device(first.device):  # Triton launches on the current device
                    return eager(*args, **keywords)
            return eager(*args, **keywords)

        vars(public).update(
            __signature__=values.signature.replace(return_annotation=values.result),
            reference=reference,
            wrap=values.wrap,
            has_gradient=gradient is not None,
        )
        made = cast("Op[P, R]", public)
        OPS[name] = made
        return made

    return register


def _rest(steps: Steps[R]) -> R:
    """What a contract returns when it goes on behind its checks."""
    try:
        next(steps)
    except StopIteration as end:
        return end.value
    raise RuntimeError(f"{steps} yields twice; expected checks, one yield, and the reference")


class _Values:
    """The arguments of a contract that are weights or pages: several tensors to torch, one value to everybody else."""

    def __init__(self, body: Callable) -> None:
        self.signature = inspect.signature(body)
        self.result = str(self.signature.return_annotation).removeprefix("Steps[").removesuffix("]")
        kinds = {"Weight": as_weight, "Pages": as_pages}
        annotations = [parameter.annotation for parameter in self.signature.parameters.values()]
        names = list(self.signature.parameters)
        self.places = [(at, names[at], kinds[each]) for at, each in enumerate(annotations) if each in kinds]

    def wrap(self, args: tuple, keywords: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Tensors become dense weights, and pairs of them dense pages."""
        for at, name, as_value in self.places:
            if at < len(args):
                if isinstance(args[at], (Tensor, tuple, list)):
                    args = (*args[:at], as_value(args[at]), *args[at + 1 :])
            elif name in keywords:
                keywords = keywords | {name: as_value(keywords[name])}
        return args, keywords

    def call_torch(self, name: str, args: tuple, keywords: dict[str, Any]) -> Any:
        formats = {}
        for at, parameter, _ in self.places:
            value = args[at] if at < len(args) else keywords[parameter]
            if not isinstance(value, (Weight, Pages)):
                continue  # torch says what is wrong with it
            if at < len(args):
                args = (*args[:at], list(value.tensors), *args[at + 1 :])
            else:
                keywords = keywords | {parameter: list(value.tensors)}
            formats[f"{parameter}_format"] = value.format
        return getattr(torch.ops.qwenkern, name)(*args, **keywords, **formats)

    def from_torch(self, args: tuple, keywords: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        for at, parameter, as_value in self.places:
            form = keywords.pop(f"{parameter}_format")
            if at < len(args):
                args = (*args[:at], as_value(args[at], form), *args[at + 1 :])
            else:
                keywords[parameter] = as_value(keywords[parameter], form)
        return args, keywords


def _register_with_torch(
    body: Callable,
    values: _Values,
    eager: Callable,
    fake: Callable,
    mutates: tuple[str, ...],
    gradient: Gradient | None,
) -> None:
    hints = typing.get_type_hints(body)
    parameters = []
    for parameter in values.signature.parameters.values():
        hint = hints[parameter.name]
        parameters.append(parameter.replace(annotation=list[Tensor] if hint in (Weight, Pages) else hint))
    for _, name, _ in values.places:
        parameters.append(
            inspect.Parameter(f"{name}_format", inspect.Parameter.KEYWORD_ONLY, default="dense", annotation=str)
        )
    result = typing.get_args(hints["return"])[2]  # of Generator[None, None, ...]

    def through_torch(function: Callable) -> Callable:
        @functools.wraps(body)
        def call(*args: Any, **keywords: Any) -> Any:
            if values.places:
                bound = library_signature.bind(*args, **keywords)
                bound.apply_defaults()
                args, keywords = values.from_torch(bound.args, bound.kwargs)
            inputs = [*_tensors(args), *_tensors(keywords.values())]
            return _own(function(*args, **keywords), inputs)

        vars(call)["__signature__"] = library_signature
        return call

    library_signature = inspect.Signature(parameters, return_annotation=result)
    custom = torch.library.custom_op(f"qwenkern::{body.__name__}", through_torch(eager), mutates_args=mutates)
    custom.register_fake(through_torch(fake))
    if gradient:
        custom.register_autograd(gradient[1], setup_context=gradient[0])


def _own(outputs: Any, inputs: list[Tensor]) -> Any:
    """torch.library wants outputs that are not inputs (a stream that begins with x returns x as its residual), and that
    lie as the fakes say: densely, where a reference keeps the order of its input's dimensions."""
    if not isinstance(outputs, tuple):
        return outputs.contiguous()
    return tuple(
        out.clone(memory_format=torch.contiguous_format) if any(out is each for each in inputs) else out.contiguous()
        for out in outputs
    )


def _tensors(given: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among arguments, those of weights and pages included."""
    for each in given:
        if isinstance(each, Tensor):
            yield each
        elif isinstance(each, (Weight, Pages)):
            yield from each.tensors


def _first_tensor(given: Iterable[Any]) -> Tensor | None:
    return next(_tensors(given), None)


def _is_for_torch(given: Iterable[Any]) -> bool:
    """Whether torch must see an argument itself: it wants a gradient, or is a subclass, which may have no memory of
    its own (DTensor, torchao's), or is negated when it is read. A launcher would not know."""
    wants_gradient = torch.is_grad_enabled()
    for each in given:
        kind = type(each)
        if kind is Tensor or kind is Parameter:
            if each.is_neg() or (wants_gradient and each.requires_grad):
                return True
        elif isinstance(each, Tensor) or (isinstance(each, (Weight, Pages)) and _is_for_torch(each.tensors)):
            return True
    return False


def _is_traced() -> bool:
    """Whether torch follows what happens: a launcher's work, which it does not see, would be missing."""
    return (
        torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
    )


def _refuse_negated(body: Callable, names: tuple[str, ...], args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    """Raises where an argument to be written to is negated when it is read: torch has no way to write to it."""
    if names:
        given = inspect.signature(body).bind(*args, **keywords).arguments
        for argument in names:
            value = given[argument]
            parts = zip(value.names, value.tensors, strict=True) if isinstance(value, Pages) else [(argument, value)]
            for name, each in parts:
                if isinstance(each, Tensor) and each.is_neg():
                    raise ValueError(
                        f"{body.__name__}: {name} is written to, and is a negated view; expected a plain one"
                    )


def _refuse_tangents(name: str, args: tuple[Any, ...]) -> None:
    """Raises where a forward-mode derivative would silently be lost."""
    for each in _tensors(args):
        if torch.autograd.forward_ad.unpack_dual(each).tangent is not None:
            raise NotImplementedError(f"{name} has no forward-mode derivative; expected tensors without tangents")
