"""The contract of an op: its signature, docstring, checks and torch reference, in one function.

    @op()
    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Steps[Tensor]:
        "What users read: formula, shapes, dtypes, roundings, source."
        check_tensor("rms_norm", "x", x, ("...", "H"))   # the checks raise
        yield                                            # if a backend takes the arguments, it runs
        return ...                                       # here (dispatch.py); else the reference follows

The decorator ``op`` makes the public function of it, and registers torch.ops.qwenkern.<its name> for
torch.compile, autograd and tracing. Eager calls without gradients skip torch's dispatcher, which would add tens of
microseconds to a call.
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

from .dispatch import OPS, Implementation, Op, is_served, serving
from .pages import Pages, as_pages
from .remembered import REMEMBERED, remember, signature
from .weights import Weight, as_weight

P = ParamSpec("P")
R = TypeVar("R")
Steps = Generator[None, None, R]  # the type of a contract's body: checks, one yield, the reference
Gradient = tuple[Callable[..., None], Callable[..., Any]]  # setup_context and backward


def op(
    *, fake: Callable | None = None, mutates: tuple[str, ...] = (), gradient: Gradient | None = None
) -> Callable[[Callable[P, Steps[R]]], Op[P, R]]:
    """Makes a public op from a contract.

    ``fake`` returns empty results of the right shapes and dtypes. By default the contract itself runs on torch's fake
    tensors; pass ``fake`` where the reference reads values. ``mutates`` names the arguments that the op writes to.
    ``gradient`` is what torch.library.register_autograd takes. Without it, a backward pass through the op raises.

    In torch.ops, a Weight argument is passed as the list of its tensors, and the keyword ``<name>_format`` names its
    format. Pages are passed in the same way."""

    def register(body: Callable[P, Steps[R]]) -> Op[P, R]:
        name = body.__name__
        values = _Values(body)

        def reference(*args: Any, **keywords: Any) -> Any:
            args, keywords = values.wrap(args, keywords)
            steps = body(*args, **keywords)
            next(steps)
            return _rest(steps)

        def checked(args: tuple, keywords: dict[str, Any]) -> tuple[Steps, Implementation | None]:
            steps = body(*args, **keywords)
            next(steps)
            first = args[0] if args else next(_tensors(keywords.values()))
            return steps, serving(name, first, *args, **keywords)

        def eager(*args: Any, **keywords: Any) -> Any:
            steps, found = checked(args, keywords)
            return _rest(steps) if found is None else _run(found, args, keywords)

        def on_gpu(*args: Any, **keywords: Any) -> Any:
            key = signature(name, args, keywords)
            if key is not None and (known := REMEMBERED.get(key)):
                return _run(known, args, keywords)
            steps, found = checked(args, keywords)
            if found is None:
                return _rest(steps)
            if key is not None:
                remember(key, found)
            return _run(found, args, keywords)

        if not hasattr(torch.ops.qwenkern, name):  # a second copy of this folder uses the op of the first copy
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
            if first is not None and first.is_meta and not is_served("meta"):
                shapes_only = all(each.is_meta for each in _tensors(given))  # if not, a check raises
                return values.call_torch(name, args, keywords) if shapes_only else eager(*args, **keywords)
            return eager(*args, **keywords) if first is None or first.is_cpu else on_gpu(*args, **keywords)

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
    """Runs the reference of a contract whose checks have run, and returns its result."""
    try:
        next(steps)
    except StopIteration as end:
        return end.value
    raise RuntimeError(f"{steps} yields twice; expected checks, one yield, and the reference")


class _Values:
    """The arguments of a contract that are weights or pages. torch passes each as a list of tensors; backends and
    references get one value."""

    def __init__(self, body: Callable) -> None:
        self.signature = inspect.signature(body)
        self.result = str(self.signature.return_annotation).removeprefix("Steps[").removesuffix("]")
        kinds = {"Weight": as_weight, "Pages": as_pages}
        annotations = [parameter.annotation for parameter in self.signature.parameters.values()]
        names = list(self.signature.parameters)
        self.places = [(at, names[at], kinds[each]) for at, each in enumerate(annotations) if each in kinds]

    def wrap(self, args: tuple, keywords: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Turns tensors into dense weights, and pairs of tensors into dense pages, where the contract has those."""
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
                continue  # torch raises and says what is wrong with it
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
    result = typing.get_args(hints["return"])[2]  # the third argument of Generator

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
    """Copies outputs where torch.library requires it: no output may be an input, and each must be contiguous as the
    fake says. add_rms_norm without a residual returns x itself, and a reference may keep the dimension order of its
    input."""
    if not isinstance(outputs, tuple):
        return outputs.contiguous()
    return tuple(
        out.clone(memory_format=torch.contiguous_format) if any(out is each for each in inputs) else out.contiguous()
        for out in outputs
    )


def _tensors(given: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among some arguments, with those of weights and pages."""
    for each in given:
        if isinstance(each, Tensor):
            yield each
        elif isinstance(each, (Weight, Pages)):
            yield from each.tensors


def _run(found: Implementation, args: tuple, keywords: dict[str, Any]) -> Any:
    """Runs an implementation on the device of the first tensor, because Triton launches on the current device."""
    first = args[0] if args and isinstance(args[0], Tensor) else next(_tensors((*args, *keywords.values())))
    if first.is_cuda and first.device.index != torch.cuda.current_device():
        with torch.cuda.device(first.device):
            return found.run(*args, **keywords)
    return found.run(*args, **keywords)


def _first_tensor(given: Iterable[Any]) -> Tensor | None:
    return next(_tensors(given), None)


def _is_for_torch(given: Iterable[Any]) -> bool:
    """Whether torch must run the call, because a kernel that reads the argument's memory would compute something else.
    This holds for a tensor that requires a gradient, for a subclass of Tensor, which may have no memory of its own
    (DTensor, torchao), and for a view that is negated when it is read."""
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
    """Whether torch traces the call. torch does not see what a kernel does, so the trace would lack the op."""
    return (
        torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
    )


def _refuse_negated(body: Callable, names: tuple[str, ...], args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    """Raises ValueError if an argument that the op writes to is a view that is negated when it is read: torch cannot
    write through such a view."""
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
    """Raises NotImplementedError for forward-mode tangents, which the kernels would silently drop."""
    for each in _tensors(args):
        if torch.autograd.forward_ad.unpack_dual(each).tangent is not None:
            raise NotImplementedError(f"{name} has no forward-mode derivative; expected tensors without tangents")
