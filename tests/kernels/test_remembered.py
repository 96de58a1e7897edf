"""The remembered implementation of an op on a GPU is used only for calls that would pass the checks, and is the one
that dispatch would choose. Meta tensors stand for those of a GPU."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from test_arguments import calls
from torch import Tensor
from torch.utils._pytree import tree_map

from qwenkern import kernels
from qwenkern.benchmarks.offline.machine_code import DEVICES
from qwenkern.kernels import remembered
from qwenkern.kernels.dispatch import Implementation
from qwenkern.kernels.triton import tuning
from qwenkern.kernels.triton.backend import TRITON

contract = importlib.import_module("qwenkern.kernels.contract")
CALLS = {
    name: tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, given) for name, given in calls().items()
}


class Seen:
    """The choices of a backend that were made, and the calls that ran."""

    def __init__(self) -> None:
        self.chosen, self.ran = 0, 0

    def serving(self, name: str, first: Tensor, *args: Any, **keywords: Any) -> Implementation:
        self.chosen += 1
        return Implementation(TRITON, self.run, lambda *args: None)

    def run(self, *args: Any, **keywords: Any) -> str:
        self.ran += 1
        return "ran"


@pytest.fixture
def seen() -> Iterator[Seen]:
    seen = Seen()
    with tuning.offline(DEVICES["sm_90"]), mock.patch.object(contract, "serving", seen.serving):
        yield seen


def changes(value: Any) -> Iterator[Any]:
    """Other arguments, each of which differs in one respect."""
    if isinstance(value, Tensor):
        yield value.to(torch.float32 if value.dtype != torch.float32 else torch.bfloat16)
        yield value.to(torch.int32 if value.dtype != torch.int32 else torch.int64)
        yield torch.empty_like(value, device="cpu")
        yield torch.cat((value, value))
        yield value[:0]
        yield value[..., None]
        yield value.new_empty(*value.shape[:-1], 2 * value.shape[-1])[..., ::2]
        if value.dim() > 1:
            yield value.transpose(0, 1)
            yield value.new_empty(2 * len(value), *value.shape[1:])[::2]
    elif isinstance(value, tuple):
        for at, each in enumerate(value):
            for other in changes(each):
                yield (*value[:at], other, *value[at + 1 :])
    elif isinstance(value, float | int):
        yield from (0, 1, 1.0, True, 10**9)
    yield from (None, "text")


def outcome(name: str, given: dict[str, Any]) -> str:
    try:
        return str(getattr(kernels, name)(**given))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_call_after_a_right_one_raises_as_before_it(seen, name):
    given, raised = CALLS[name], 0
    for argument, value in given.items():
        for other in changes(value):
            wrong = given | {argument: other}
            remembered.REMEMBERED.clear()
            expected = outcome(name, wrong)
            remembered.REMEMBERED.clear()
            assert outcome(name, given) == "ran"
            assert outcome(name, wrong) == expected
            raised += expected != "ran"
    assert raised > 5, "too few calls are wrong, so this shows little"


@pytest.mark.parametrize("name", CALLS)
def test_a_second_call_is_not_checked_again(seen, name):
    assert outcome(name, CALLS[name]) == "ran"
    for by in (lambda given: ((), given), lambda given: (tuple(given.values()), {})):
        args, keywords = by(CALLS[name])
        getattr(kernels, name)(*args, **keywords)
        before = seen.chosen
        assert getattr(kernels, name)(*args, **keywords) == "ran"
        assert seen.chosen == before


def _other_device() -> Any:
    return tuning.offline(DEVICES["sm_80"])


def _reference() -> Any:
    return mock.patch.dict("os.environ", {"QWENKERN_KERNELS": "reference"})


@pytest.mark.parametrize("somewhere_else", [_other_device, _reference])
def test_the_choice_is_made_again_elsewhere(seen, somewhere_else: Callable[[], Any], monkeypatch):
    monkeypatch.delenv("QWENKERN_KERNELS", raising=False)
    name = "rms_norm"
    assert outcome(name, CALLS[name]) == "ran"
    assert seen.chosen == 1
    with somewhere_else():
        assert outcome(name, CALLS[name]) == "ran"
    assert seen.chosen == 2


def test_what_is_equal_to_python_is_told_apart():
    x = torch.empty(3, device="meta")
    ways = [(x, 1), (x, 1.0), (x, True), (x, None), (x,), (None, x)]
    keys = [remembered.signature("an op", given, {}) for given in ways]
    keys += [remembered.signature("another op", (x, 1), {}), remembered.signature("an op", (x,), {"eps": 1})]
    assert None not in keys
    assert len(set(keys)) == len(keys)
    assert remembered.signature("an op", (x, "text"), {}) is None


def test_nothing_is_remembered_on_a_cpu():
    remembered.REMEMBERED.clear()
    for name, given in calls().items():
        getattr(kernels, name)(**given)
    assert not remembered.REMEMBERED


def test_what_is_remembered_is_bounded(seen, monkeypatch):
    monkeypatch.setattr(remembered, "MOST", 4)
    for rows in range(1, 20):
        x = torch.empty(rows, 16, device="meta")
        assert kernels.rms_norm(x, torch.empty(16, device="meta"), 1e-6) == "ran"
        assert len(remembered.REMEMBERED) <= 4
