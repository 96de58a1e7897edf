"""Unusual tensors, such as views and subclasses, as each argument of each op: the same values as for a plain tensor, or
an error that says what is wrong; never a crash or other values."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.references import tensors_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map

from qwenkern import Config, kernels
from qwenkern.benchmarks.ops.cases import CASES, Size
from qwenkern.kernels.dispatch import OPS
from qwenkern.kernels.pages import DensePages
from qwenkern.kernels.weights import Dense

TOKENS, HEADS, KV_HEADS, DIM, HIDDEN = 2, 4, 2, 32, 64


def tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(hash((shape, seed)))).bfloat16()


def calls() -> dict[str, dict[str, Any]]:
    """Each op with arguments that it takes, by name. On a CPU those that have a C function run in it."""
    x, weight = tensor(TOKENS, HIDDEN), tensor(HIDDEN, seed=1)
    residual, normed = tensor(TOKENS, HIDDEN, seed=2), {"x": x, "norm_weight": weight, "eps": 1e-6}
    pages = {"pages": tuple(tensor(4, 16, KV_HEADS, DIM, seed=seed) for seed in (3, 4))}
    places = {
        "positions": torch.tensor([3, 4]),
        "cos_sin": torch.rand(8, DIM, generator=torch.Generator().manual_seed(5)),
        **pages,
        "slots": torch.tensor([3, 20]),
    }
    width = (HEADS + 2 * KV_HEADS) * DIM
    q = tensor(TOKENS, HEADS, DIM, seed=6)
    paged = {"q": q, **pages, "block_tables": torch.tensor([[0, 1], [2, 3]]), "lengths": torch.tensor([20, 17])}
    dense = {name: tensor(1, heads, 5, DIM, seed=7) for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))}
    vocabulary = tensor(96, HIDDEN, seed=8)
    return {
        "embedding": {"ids": torch.tensor([3, 1]), "weight": vocabulary},
        "rms_norm": {"x": x, "weight": weight, "eps": 1e-6},
        "add_rms_norm": {"x": x, "residual": residual, "weight": weight, "eps": 1e-6},
        "rms_norm_backward": {
            "grad": x,
            "grad_residual": residual,
            "x": x + 1,
            "weight": weight,
            "eps": 1e-6,
        },
        "apply_rope": {
            "q": q,
            "k": tensor(TOKENS, KV_HEADS, DIM, seed=9),
            "cos_sin": places["cos_sin"],
            "positions": places["positions"],
        },
        "rope_and_cache": {"qkv": tensor(TOKENS, width), **places},
        "attention": {**dense, "scale": 0.2},
        "decode_attention": {**paged, "scale": 0.2},
        "prefill_attention": {**paged, "query_starts": torch.tensor([0, 1, 2]), "scale": 0.2},
        "linear": {"x": x, "weight": vocabulary, "bias": tensor(96), "addend": tensor(TOKENS, 96)},
        "norm_linear": {**normed, "weight": vocabulary, "bias": tensor(96)},
        "norm_qkv_rope": {**normed, "weight": tensor(width, HIDDEN, seed=10), "bias": tensor(width), **places},
        "norm_swiglu_linear": {**normed, "weight": vocabulary},
        "lm_head": {**normed, "weight": vocabulary},
        "lm_head_top_k": {**normed, "weight": vocabulary, "k": 3},
        "swiglu": {"gate_up": x},
        "silu_mul": {"gate": x, "up": x + 1},
        "swiglu_backward": {"grad": tensor(TOKENS, HIDDEN // 2), "gate_up": x},
        "silu_mul_backward": {"grad": x, "gate": x + 1, "up": x + 2},
    }


def of_cases() -> dict[str, dict[str, Any]]:
    """Each op with the arguments that the benchmarks measure it with."""
    config = Config(96, HIDDEN, 96, 1, HEADS, KV_HEADS, DIM, max_position_embeddings=8)
    found: dict[str, dict[str, Any]] = {}
    for case in CASES:
        given = case.inputs(config, Size(TOKENS, 8, device="cpu"))
        found.setdefault(
            case.op, dict(zip(inspect.signature(getattr(kernels, case.op)).parameters, given, strict=False))
        )
    return found


CALLS = calls()
CALLS |= {op: given for op, given in of_cases().items() if op not in CALLS}  # a new op needs no line above
WITH_A_MATRIX = ("embedding", *(op for op in CALLS if "linear" in op or "lm_head" in op), "norm_qkv_rope")
IN_A_PAIR = {"k_pages": 0, "v_pages": 1}  # the tensors of the argument called pages
PLACES = [
    (op, name)
    for op, given in CALLS.items()
    for argument, value in given.items()
    for name in (IN_A_PAIR if argument == "pages" else [argument] if isinstance(value, Tensor) else [])
]


def is_written(op: str, name: str) -> bool:
    return op in ("rope_and_cache", "norm_qkv_rope") and name in IN_A_PAIR


def of(given: dict[str, Any], name: str) -> Any:
    """An argument, or one of the tensors of pages."""
    return tensors_of(given["pages"])[IN_A_PAIR[name]] if name in IN_A_PAIR else given[name]


class Wrapper(Tensor):
    """Has sizes and no memory, as DTensor and torchao's weights: only its dispatch knows where the values are."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        return Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), dtype=inner.dtype)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(lambda x: x.inner if isinstance(x, Wrapper) else x, (args, kwargs or {}))
        return function(*args, **kwargs)


class Closed(Wrapper):
    """A wrapper that knows none of our ops."""

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(f"Closed has no rule for {function}")


class Named(Tensor):
    """With memory."""


def freed(x: Tensor) -> Tensor:
    """As sharded training leaves a weight between its uses."""
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


@pytest.fixture(autouse=True, params=["C", "torch"])
def backend(request, monkeypatch) -> str:
    monkeypatch.setenv("QWENKERN_KERNELS", "reference" if request.param == "torch" else "triton")
    monkeypatch.setattr("qwenkern.kernels.triton.backend.INTERPRETED", False)
    return request.param


def outcome(op: str, given: dict[str, Any], by_name: bool) -> list[Tensor]:
    """What an op returns, and what it has changed."""
    function = getattr(kernels, op)
    results = function(**given) if by_name else function(*given.values())
    results = results if isinstance(results, tuple) else (results,)
    changed = [of(given, name) for name in IN_A_PAIR if is_written(op, name)]
    return [each.inner if isinstance(each, Wrapper) else each for each in (*results, *changed)]


def with_one(op: str, name: str, made: Callable[[Tensor], Any]) -> dict[str, Any]:
    """Arguments, one of them made into something else."""
    given = copy.deepcopy(CALLS[op])
    if name in IN_A_PAIR:
        given["pages"] = tuple(made(x) if at == IN_A_PAIR[name] else x for at, x in enumerate(given["pages"]))
    else:
        given[name] = made(given[name])
    return given


def test_every_op_is_here():
    assert set(CALLS) == set(OPS) == set(kernels.__all__) - {"Pages", "Weight"}
    for op, given in CALLS.items():
        parameters = inspect.signature(getattr(kernels, op)).parameters
        assert list(given) == list(parameters)[: len(given)]
        assert {name for name in parameters if name not in given} <= {"inverse"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, Triton's interpreter is off")
@pytest.mark.parametrize("op", CALLS)
def test_arguments_by_name_and_as_values_reach_triton_too(op, backend, monkeypatch):
    if backend == "torch":
        return
    monkeypatch.setattr("qwenkern.kernels.triton.backend.INTERPRETED", True)
    as_values = {"pages": lambda pages: DensePages(*pages), "weight": Dense if op in WITH_A_MATRIX else lambda x: x}
    given = {name: as_values.get(name, lambda x: x)(value) for name, value in copy.deepcopy(CALLS[op]).items()}
    expected = outcome(op, copy.deepcopy(CALLS[op]), False)
    for result, wanted in zip(outcome(op, given, True), expected, strict=True):
        assert torch.equal(result, wanted)


def test_other_numbers_of_tensors_are_refused():
    for op, given in CALLS.items():
        if "pages" in given:
            for pages in ((), given["pages"][:1], (*given["pages"], given["pages"][0])):
                with pytest.raises(
                    TypeError, match=f"{op}: pages must be Pages or a pair of tensors, and is {len(pages)} "
                ):
                    outcome(op, given | {"pages": pages}, True)
        if op in WITH_A_MATRIX:
            for weight in ([], 2 * [given["weight"]]):
                with pytest.raises(TypeError, match=f"{op}: weight must be a tensor or a Weight, and is list"):
                    outcome(op, given | {"weight": weight}, True)


SAME = {
    "a subclass with memory": lambda x: x.as_subclass(Named),
    "a wrapper without memory": Wrapper,
    "a negated view": lambda x: torch._neg_view(-x),
    "an inference tensor": lambda x: torch.inference_mode()(x.clone)(),
}


@pytest.mark.parametrize(("op", "name"), PLACES)
def test_the_same_values_from_another_kind_of_tensor(op, name):
    expected = outcome(op, copy.deepcopy(CALLS[op]), False)
    for kind, made in SAME.items():
        if is_written(op, name) and kind == "a negated view":
            with pytest.raises(ValueError, match=f"{op}: {name} is written to, and is a negated view"):
                outcome(op, with_one(op, name, made), True)
            continue
        if is_written(op, name) and kind == "an inference tensor":
            continue  # torch does not allow a write to it
        for by_name in (False, True):
            results = outcome(op, with_one(op, name, made), by_name)
            for result, wanted in zip(results, expected, strict=True):
                assert torch.equal(result.as_subclass(Tensor), wanted), kind


REFUSED = {
    "a wrapper that knows no op of ours": Closed,
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.float().to_sparse().to(x.dtype),
    "sparse in rows": lambda x: (x if x.dim() == 2 else x.reshape(-1, x.shape[-1])).to_sparse_csr(),
    "mkldnn": lambda x: x.float().to_mkldnn(),
    "nested": lambda x: torch.nested.nested_tensor([x, x]),
    "jagged": lambda x: torch.nested.nested_tensor([x, x], layout=torch.jagged),
    "quantized": lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
    "no tensor": lambda x: x.tolist(),
    "a number": lambda x: 1.0,
}
WITHOUT_NAME = ("a wrapper that knows no op of ours", "jagged")  # the subclass's own error
SAID = (TypeError, ValueError, NotImplementedError)


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, of layouts that it may drop
@pytest.mark.parametrize(("op", "name"), PLACES)
def test_what_no_op_takes_is_refused(op, name):
    for kind, made in REFUSED.items():
        if kind == "meta" and [each for each, _ in PLACES].count(op) == 1:
            continue  # all of them are, which is a question about shapes
        other = with_one(op, name, made)
        for by_name in (False, True):
            with pytest.raises(Exception if kind == "jagged" else SAID) as error:  # that one is torch's to refuse
                outcome(op, other, by_name)
            assert kind == "jagged" or op in str(error.value), kind
            assert kind in WITHOUT_NAME or name in str(error.value), kind


@pytest.mark.parametrize("made", [freed, lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype)])
@pytest.mark.parametrize(("op", "name"), PLACES)
def test_what_has_no_memory_is_refused_in_c(op, name, made, backend):
    """torch itself reads through the pointer, so only C is tested."""
    if backend == "torch" or "backward" in op or op in ("attention", "lm_head_top_k", "penalise"):
        return
    other = with_one(op, name, made)
    if not of(other, name).is_floating_point():  # numbers, which are looked at before
        return
    said = ""
    try:
        outcome(op, other, True)
    except TypeError as error:  # not by pytest.raises: it would print the tensors
        said = str(error)
    except RuntimeError as error:  # torch's, of a view of what is freed
        said = str(error)
    assert "has no memory" in said or "storage of size 0" in said


@pytest.mark.parametrize("op", CALLS)
def test_shapes_alone_give_shapes(op):
    expected = outcome(op, copy.deepcopy(CALLS[op]), False)
    given = tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, CALLS[op])
    fake = copy.deepcopy(CALLS[op])
    with FakeTensorMode() as mode:
        faked = outcome(op, tree_map(lambda x: mode.from_tensor(x) if isinstance(x, Tensor) else x, fake), False)
    for found in (outcome(op, given, False), faked):
        for result, wanted in zip(found, expected, strict=True):
            assert result.is_meta or isinstance(result, FakeTensor)
            assert (result.shape, result.dtype) == (wanted.shape, wanted.dtype)


@pytest.mark.parametrize(("op", "name"), PLACES)
def test_an_argument_that_wants_a_gradient_gets_one_or_an_error(op, name):
    other = with_one(op, name, lambda x: x.requires_grad_() if x.is_floating_point() else x)
    if not of(other, name).is_floating_point():
        return
    if (op, name) == ("apply_rope", "cos_sin"):
        with pytest.raises(NotImplementedError, match="no gradient of cos_sin"):
            outcome(op, other, True)
        return
    results, expected = outcome(op, other, True), outcome(op, copy.deepcopy(CALLS[op]), True)
    for result, wanted in zip(results, expected, strict=True):
        assert torch.equal(result, wanted)
    if not any(result.is_floating_point() for result in results):
        return  # ids, which nothing flows back from
    loss = sum(result.float().sum() for result in results if result.requires_grad)
    if getattr(kernels, op).has_gradient:
        loss.backward()
        assert of(other, name).grad.isfinite().all()
    else:
        with pytest.raises(RuntimeError, match=r"qwenkern|does not require grad"):
            loss.backward()


@pytest.mark.parametrize(("op", "name"), PLACES)
def test_too_few_elements_are_an_error_that_names_them(op, name):
    """Of a tensor whose first dimension is 0, or whose last."""
    for cut in (lambda x: x[:0], lambda x: x[..., :0]):
        other = with_one(op, name, cut)
        if op in ("rms_norm", "swiglu") and len(of(other, name)) == 0 < of(other, name).shape[-1]:
            assert outcome(op, other, True)[0].shape[0] == 0  # no rows: none come back
        else:
            with pytest.raises((ValueError, TypeError), match=op):
                outcome(op, other, True)
