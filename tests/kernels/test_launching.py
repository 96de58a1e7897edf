"""Launch plans: for any launches in any order, the kernel that runs is the one that Triton would have chosen."""

from __future__ import annotations

import importlib
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from support.mutations import Mutation
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from qwenkern.benchmarks.offline.machine_code import DEVICES
from qwenkern.kernels.triton.offline import OfflineDriver

FILE = "triton/launching.py"
MEMORY = torch.arange(64, dtype=torch.float64)  # 16-byte aligned
assert MEMORY.data_ptr() % 16 == 0


class Matrix(NamedTuple):
    data: Any
    stride: Any


class OtherMatrix(NamedTuple):
    data: Any
    stride: Any


def _kernel(out_ptr, matrix, addend_ptr, rows, stride, eps, LOAD: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Nothing compiles or runs it."""


def _tensor(dtype: torch.dtype, offset: int) -> Tensor:
    return MEMORY.view(dtype)[offset:]


def _tensors() -> list[Tensor]:
    kinds = (torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.int64)
    tensors = [_tensor(dtype, offset) for dtype in kinds for offset in (0, 1, 2, 4, 8)]
    return [*tensors, torch.nn.Parameter(_tensor(torch.float32, 0)), torch.nn.Parameter(_tensor(torch.float32, 1))]


NUMBERS = (0, 1, 2, 8, 15, 16, 17, 32, 33, 2048, 2049, 2**31 - 1, 2**31, 2**31 + 1, 2**40, -1, -16, -17)


class Calls:
    """A kernel whose launches are recorded. In place of a compiled kernel there is what Triton makes one for."""

    def __init__(self, ops: Any) -> None:
        self.launching = importlib.import_module(f"{ops.__name__}.triton.launching")
        self.kernel = JITFunction(_kernel, do_not_specialize=["rows"])
        self.planned = self.launching.Planned(self.kernel)
        self.bound = 0  # launches that Triton bound
        self.launched: list[Any] = []

    def run(self, *args: Any, grid: Any, warmup: bool, **constants: Any) -> CompiledKernel:
        self.bound += 1
        device = driver.active.get_current_device()
        bound, specialization, options = self.kernel.device_caches[device][-1](*args, **constants)
        chosen = str((device, specialization, sorted(options.items())))
        compiled = CompiledKernel.__new__(CompiledKernel)
        compiled.function, compiled.packed_metadata, compiled.module = chosen, "metadata", "loaded"
        compiled._run = lambda *given: self.launched.append((chosen, given))
        hooks = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
        sizes = (*grid, 1, 1)[:3]
        compiled._run(
            *sizes, driver.active.get_current_stream(device), chosen, "metadata", None, *hooks, *bound.values()
        )
        return compiled

    def launch(self, how: Any, grid: tuple[int, ...], args: tuple, constants: dict[str, Any]) -> tuple[Any, ...]:
        """What the launcher of a compiled kernel gets, with addresses in place of tensors and without the hooks."""
        how[grid](*args, **constants)
        chosen, given = self.launched.pop()
        return chosen, given[:6], _addresses(given[9:])


def _addresses(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_addresses(each) for each in value)
    return value.data_ptr() if isinstance(value, Tensor) else value


@contextmanager
def recorded(ops: Any, device: int = 0) -> Iterator[Calls]:
    calls = Calls(ops)
    with _on(device), mock.patch.object(JITFunction, "run", lambda self, *args, **given: calls.run(*args, **given)):
        yield calls


@contextmanager
def _on(device: int) -> Iterator[None]:
    fake = OfflineDriver(DEVICES["sm_90"])
    fake.number = device
    fake.get_current_stream = lambda device: 7000 + device
    with mock.patch.object(driver, "_active", fake):
        yield


def _random_launch(rng: random.Random, tensors: list[Tensor]) -> tuple[tuple[int, ...], tuple, dict[str, Any]]:
    matrix = rng.choice((Matrix, OtherMatrix))(rng.choice(tensors), rng.choice(NUMBERS))
    args = (
        rng.choice(tensors),
        matrix,
        rng.choice([None, *tensors]),
        rng.choice(NUMBERS),
        rng.choice(NUMBERS),
        rng.choice((0.5, 1.0, 1, True, 16, 1e-6)),
    )
    constants = {"LOAD": rng.choice((None, LOADS[0], LOADS[1])), "BLOCK": rng.choice((16, 32)), "PDL": False}
    constants["num_warps"] = rng.choice((4, 8))
    if rng.random() < 0.3:
        constants |= {"PDL": True, "launch_pdl": True}
    return tuple(rng.choice((1, 5)) for _ in range(rng.choice((1, 2, 3)))), args, constants


def _load_a(x):
    return x


def _load_b(x):
    return x


LOADS = JITFunction(_load_a), JITFunction(_load_b)


def test_a_plan_launches_what_triton_would(ops, device):
    """10,000 launches of few kinds: many differ from an earlier one in a single respect."""
    rng, tensors, planned = random.Random(0), _tensors(), 0
    with recorded(ops) as calls:
        kinds = [_random_launch(rng, tensors) for _ in range(60)]
        for _ in range(10000):
            grid, args, constants = rng.choice(kinds)
            at = rng.randrange(len(args))
            other = rng.choice(kinds)[1][at]
            args = (*args[:at], other, *args[at + 1 :])
            expected = calls.launch(calls.kernel, grid, args, constants)
            before = calls.bound
            assert calls.launch(calls.planned, grid, args, constants) == expected
            planned += calls.bound == before
    assert planned > 5000, "too few launches had a plan, so this shows little"


_PAIRS = [(torch.bfloat16, 8, 1), (torch.float32, 0, 2)]  # a dtype, and offsets that differ in alignment


@pytest.mark.parametrize(("dtype", "one", "other"), _PAIRS)
def test_alignment(ops, device, dtype, one, other):
    def args(offset: int) -> tuple:
        tensor = _tensor(dtype, offset)
        return tensor, Matrix(tensor, 16), tensor, 16, 16, 0.5

    _alternate(ops, args(one), args(other) if _tensor(dtype, other).data_ptr() % 16 else args(1))


@pytest.mark.parametrize(("one", "other"), [(16, 17), (17, 1), (2**31, 2048), (2**31 + 1, 17), (0, 1)])
def test_numbers(ops, device, one, other):
    tensor = _tensor(torch.float32, 0)
    first, second = ((tensor, Matrix(tensor, 16), None, 16, number, 0.5) for number in (one, other))
    _alternate(ops, first, second)


@pytest.mark.parametrize(("one", "other"), [(1, 1.0), (1, True), (0.5, None)])
def test_types(ops, device, one, other):
    tensor = _tensor(torch.float32, 0)
    first, second = ((tensor, Matrix(tensor, 16), None, 16, 16, value) for value in (one, other))
    _alternate(ops, first, second)


def test_dtypes(ops, device):
    first, second = (
        (tensor, Matrix(tensor, 16), None, 16, 16, 0.5)
        for tensor in (_tensor(torch.float32, 0), _tensor(torch.int32, 0))
    )
    _alternate(ops, first, second)


def test_a_pointer_that_may_be_missing(ops, device):
    tensor = _tensor(torch.float32, 0)
    first, second = ((tensor, Matrix(tensor, 16), addend, 16, 16, 0.5) for addend in (None, tensor))
    _alternate(ops, first, second)


@pytest.mark.parametrize("option", ["BLOCK", "num_warps", "launch_pdl"])
def test_constants_and_options(ops, device, option):
    tensor = _tensor(torch.float32, 0)
    args = tensor, Matrix(tensor, 16), None, 16, 16, 0.5
    one, other = {"BLOCK": (16, 32), "num_warps": (4, 8), "launch_pdl": (False, True)}[option]
    _alternate(ops, args, args, {option: one}, {option: other})


CONSTANTS = {"LOAD": None, "BLOCK": 16, "PDL": False}


def _alternate(ops: Any, first: tuple, second: tuple, *options: dict[str, Any]) -> None:
    """Two launches that Triton tells apart, in turn: each has its own plan."""
    ways = [(first, CONSTANTS), (second, CONSTANTS)]
    if options:
        ways = [(first, CONSTANTS | options[0]), (second, CONSTANTS | options[1])]
    with recorded(ops) as calls:
        expected = [calls.launch(calls.kernel, (3,), *way) for way in ways]
        assert expected[0][0] != expected[1][0], "Triton does not tell them apart, so this shows nothing"
        for _ in range(3):
            assert [calls.launch(calls.planned, (3,), *way) for way in ways] == expected
        assert calls.bound == 2 + 2, "a plan was not used"


def test_each_device_has_plans_of_its_own(ops, device):
    tensor = _tensor(torch.float32, 0)
    args = tensor, Matrix(tensor, 16), None, 16, 16, 0.5
    with recorded(ops) as calls:
        for number in (0, 1, 0, 1):
            with _on(number):
                expected = calls.launch(calls.kernel, (3,), args, CONSTANTS)
                assert calls.launch(calls.planned, (3,), args, CONSTANTS) == expected
                assert expected[1][3] == 7000 + number  # the stream


def _count(*_: Any) -> None:
    """A hook."""


def test_who_profiles_sees_every_launch(ops, device):
    tensor = _tensor(torch.float32, 0)
    args = tensor, Matrix(tensor, 16), None, 16, 16, 0.5
    with recorded(ops) as calls:

        def is_planned() -> bool:
            before = calls.bound
            calls.launch(calls.planned, (3,), args, CONSTANTS)
            return calls.bound == before

        assert [is_planned(), is_planned()] == [False, True]
        for name in ("launch_enter_hook", "launch_exit_hook"):
            with mock.patch.object(triton.knobs.runtime, name, _count):  # as before Triton 3.5
                assert not is_planned()
            hook = getattr(triton.knobs.runtime, name)
            hook.add(_count)
            assert not is_planned()
            hook.remove(_count)
        calls.kernel.add_pre_run_hook(_count)
        assert not is_planned()
        calls.kernel.pre_run_hooks.clear()
        assert is_planned()


def test_plans_are_bounded(ops, device):
    tensor = _tensor(torch.float32, 0)
    with recorded(ops) as calls, mock.patch.object(calls.launching, "MOST_PLANS", 4):
        for number in [*range(16), *range(16)]:
            args = tensor, Matrix(tensor, number), None, 16, 16, 0.5
            expected = calls.launch(calls.kernel, (3,), args, CONSTANTS)
            assert calls.launch(calls.planned, (3,), args, CONSTANTS) == expected
            assert len(calls.planned._plans) <= 4


def test_arguments_by_keyword_are_left_to_triton(ops, device):
    tensor = _tensor(torch.float32, 0)
    args, keywords = (tensor, Matrix(tensor, 16), None, 16, 16), {"eps": 0.5} | CONSTANTS
    with recorded(ops) as calls:
        expected = calls.launch(calls.kernel, (3,), args, keywords)
        for _ in range(2):
            assert calls.launch(calls.planned, (3,), args, keywords) == expected


@pytest.mark.parametrize("cdiv_of", [(0, 4), (1, 4), (4, 4), (5, 4), (151936, 32)])
def test_sizes_are_those_of_triton(ops, device, cdiv_of):
    launching = importlib.import_module(f"{ops.__name__}.triton.launching")
    assert launching.cdiv(*cdiv_of) == triton.cdiv(*cdiv_of)
    for n in (1, 2, 3, 4, 5, 16, 17, 2048, 11008):
        assert launching.next_power_of_2(n) == triton.next_power_of_2(n)


EVERY_KERNEL = """
import importlib, pkgutil
from triton.runtime.jit import JITFunction
from qwenkern.kernels import triton
from qwenkern.kernels.triton.launching import Planned

for module in pkgutil.iter_modules(triton.__path__, triton.__name__ + "."):
    for name, value in vars(importlib.import_module(module.name)).items():
        if name.startswith("_") and name.endswith("_kernel"):
            assert isinstance(value, Planned) and isinstance(value.kernel, JITFunction), f"{module.name}.{name}"
            print(name)
"""


def test_every_kernel_is_planned(compiling):
    done = subprocess.run(
        [sys.executable, "-c", EVERY_KERNEL], capture_output=True, text=True, env=compiling, cwd="/", check=False
    )
    assert done.returncode == 0, done.stderr
    assert {"_linear_kernel", "_rms_norm_kernel", "_rope_kernel"} <= set(done.stdout.split())


def _mutation(name: str, old: str, new: str, test: Callable[..., None], **parameters: Any) -> Mutation:
    return Mutation(name, FILE, old, new, test, parameters)


MUTATIONS = [
    _mutation("no alignment", "each.dtype if address % 16 == 0 else (each.dtype,)", "each.dtype", test_alignment,
              dtype=torch.bfloat16, one=8, other=1),
    _mutation("no dtype", "each.dtype if address % 16 == 0 else (each.dtype,)", "address % 16 == 0", test_dtypes),
    _mutation("no divisibility", "16 if each % 16 == 0 else 17", "16", test_numbers, one=16, other=17),
    _mutation("no 1", "each < 16 or", "1 < each < 16 or", test_numbers, one=17, other=1),
    _mutation("no width", " or each >= 2**31", "", test_numbers, one=2**31, other=2048),
    _mutation("no types", "key.append((kind, each))", "key.append(each)", test_types, one=1, other=1.0),
    _mutation("no constants", ", *constants.values()]", "]", test_constants_and_options, option="BLOCK"),
    _mutation("no device", "[device, *constants", "[*constants", test_each_device_has_plans_of_its_own),
    _mutation("hooks missed", 'getattr(hook, "calls", hook)', "None", test_who_profiles_sees_every_launch),
]  # fmt: skip
