"""Launch plans: a kernel's second launch with the same kind of arguments skips Triton's binder.

    kernel[grid](*arguments, **constants)     first: Triton binds, specialises, compiles and launches
                                              then:  one look-up, then Triton's own launcher of the compiled kernel

Triton compiles a kernel again if a constant, an option or the type of an argument changes. It also does so if these
facts change: whether an address is a multiple of 16, and whether an integer is 1 or a multiple of 16. The key of a plan
is stricter: it has the value of each number (of an integer from 16 to 2**31 - 1 only whether 16 divides it), the dtype
and the alignment of each tensor, and the device.

The binder takes about 20 us per launch, a plan about 5 us.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import Parameter
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from ..triton_if_any import INTERPRETED
from . import tuning

MOST_PLANS = 4096  # of one kernel; the lengths of prompts are part of the keys
_IS_HIP = torch.version.hip is not None  # AMD's kernels also depend on the sizes of tensors


class Planned:
    """A kernel that keeps launch plans. Launch it as a @triton.jit function; ``kernel`` is that function."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._plans: dict[Any, Callable[..., None]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.kernel[grid] if _IS_HIP or tuning.is_offline() else functools.partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        hooks = triton.knobs.runtime
        if self.kernel.pre_run_hooks or _is_hooked(hooks.launch_enter_hook) or _is_hooked(hooks.launch_exit_hook):
            self.kernel[grid](*arguments, **constants)  # a profiler has set a hook, which a plan would not call
            return
        driver = triton.runtime.driver.active
        device = driver.get_current_device()
        key: list[Any] = [device, *constants, *constants.values()]
        values: list[Any] = []
        _describe(arguments, key, values)
        found = tuple(key)
        plan = self._plans.get(found)
        if plan is None:
            compiled = self.kernel[grid](*arguments, **constants)
            self._keep(found, compiled, len(arguments), constants)
        else:
            plan(*grid, *(1,) * (3 - len(grid)), driver.get_current_stream(device), values)

    def _keep(self, key: tuple[Any, ...], compiled: Any, given: int, constants: dict[str, Any]) -> None:
        names = self.kernel.arg_names[given:]
        if not isinstance(compiled, CompiledKernel) or not all(name in constants for name in names):
            return  # an argument is passed by keyword or by default, which only Triton's binder handles
        if len(self._plans) >= MOST_PLANS:
            self._plans.clear()
        run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
        last = [constants[name] for name in names]

        def plan(x: int, y: int, z: int, stream: int, values: list[Any]) -> None:
            run(x, y, z, stream, function, metadata, None, None, None, *values, *last)

        self._plans[key] = plan


def _describe(arguments: tuple[Any, ...], key: list[Any], values: list[Any]) -> None:
    """Appends to the key all that a compiled kernel depends on, and to the values the arguments for Triton's launcher.
    In place of a tensor it gets the address, so that it need not ask the tensor again."""
    for each in arguments:
        kind = type(each)
        if kind is int:
            key.append(each if each < 16 or each >= 2**31 else 16 if each % 16 == 0 else 17)
            values.append(each)
        elif each is None:
            key.append(each)
            values.append(each)
        elif kind is Tensor or kind is Parameter or isinstance(each, Tensor):
            address = each.data_ptr()
            key.append(each.dtype if address % 16 == 0 else (each.dtype,))
            values.append(address)
        elif isinstance(each, tuple):  # the tensors and numbers of a format
            key.append(kind)
            inner: list[Any] = []
            _describe(each, key, inner)
            values.append(tuple(inner))
        else:
            key.append((kind, each))  # 1, 1.0 and True are equal, but have different types in Triton
            values.append(each)


@functools.cache
def hash_functions() -> tuple[str, ...]:
    """Hashes all functions for Triton, always in the same order. Triton's hash of a function also depends on which of
    the functions that it calls were hashed earlier. With another order, a process would not find in the cache what
    another process has compiled."""
    package, functions = __name__.rpartition(".triton.")[0], list[JITFunction]()
    for name in sorted(name for name in sys.modules if name.startswith(f"{package}.")):
        found = vars(sys.modules[name]).values()
        values = [value.kernel if isinstance(value, Planned) else value for value in found]
        functions += [each for each in values if isinstance(each, JITFunction) and each.__module__ == name]
    return tuple(function.cache_key for function in functions)


def cdiv(n: int, block: int) -> int:
    """The number of blocks that n elements need. triton.cdiv, which also works in kernels, takes 3 us on the host."""
    return -(-n // block)


def next_power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least n, as triton.next_power_of_2."""
    return 1 << (n - 1).bit_length()


def _is_hooked(hook: Any) -> bool:
    """Whether a launch hook is set: before Triton 3.5 a function or None, since then a chain of functions."""
    return bool(getattr(hook, "calls", hook))


def planned(kernel: Any) -> Any:
    """Decorates a @triton.jit kernel: it keeps launch plans, except in Triton's interpreter."""
    return kernel if INTERPRETED or isinstance(kernel, Planned) else Planned(kernel)
