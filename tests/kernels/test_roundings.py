"""The roundings of each backend, as in docs/drop-in.md. The tests count the elements that differ from the reference in
the same dtype. One rounding more or less changes a third of them, and another order of sums hardly any."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.references import mapped, random
from support.tolerances import DIFFERING, assert_as_close_as
from torch import Tensor

from qwenkern import kernels
from qwenkern.kernels import c as c_backend
from qwenkern.kernels import reference

EPS = 1e-6


def calls(tokens: int) -> dict[str, tuple[Any, ...]]:
    def made(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
        return random(*shape, dtype=torch.bfloat16, device=torch.device("cpu"), seed=seed, scale=scale)

    x, residual, norm = made(tokens, 256, seed=1), made(tokens, 256, seed=2), made(256, seed=3)
    weight, bias, heads = made(512, 256, seed=4, scale=1 / 16), made(512, seed=5), made(tokens, 4, 64, seed=6)
    places = torch.arange(tokens), torch.rand(tokens, 64, generator=torch.Generator().manual_seed(7))
    pages = made(1, 64, 1, 64, seed=8), made(1, 64, 1, 64, seed=9)
    return {
        "rms_norm": (x, norm, EPS),
        "add_rms_norm": (x, residual, norm, EPS),
        "swiglu": (x,),
        "silu_mul": (x, residual),
        "apply_rope": (heads, heads, places[1], places[0]),
        "linear": (x, weight, bias),
        "linear with an addend": (x, weight, None, made(tokens, 512, seed=10)),
        "linear with both": (x, weight, bias, made(tokens, 512, seed=10)),
        "norm_linear": (x, norm, EPS, weight, bias),
        "norm_swiglu_linear": (x, norm, EPS, weight),
        "norm_qkv_rope": (x, norm, EPS, weight[:384], bias[:384], *places, pages, torch.arange(tokens)),
        "lm_head": (x, norm, EPS, weight),
    }


# Which round less than the reference does: by the backend, and whether there are more than 16 tokens.
FEWER = {
    ("C", False): {"lm_head"},
    ("C", True): {"lm_head"},
    ("Triton", False): {"lm_head", "norm_swiglu_linear"},
    ("Triton", True): {"linear with an addend"},
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, Triton's interpreter is off")
@pytest.mark.parametrize("name", calls(1))
@pytest.mark.parametrize("tokens", [4, 20])
@pytest.mark.parametrize("backend", ["C", "Triton"])
def test_roundings_are_those_of_the_page(monkeypatch, backend, tokens, name):
    monkeypatch.setenv("QWENKERN_KERNELS", "triton")
    monkeypatch.setattr("qwenkern.kernels.triton.backend.INTERPRETED", backend == "Triton")
    if backend == "C":
        assert c_backend.prepare() is None
        here = c_backend.prepared()._replace(multiplies=True)  # also where torch is faster
        monkeypatch.setattr(c_backend.build, "_found", here)
    op, args = name.split()[0], calls(tokens)[name]
    out, expected = (getattr(room, op)(*args) for room in (kernels, reference))
    out, expected = (each[0] if isinstance(each, tuple) else each for each in (out, expected))
    differing = (out != expected).double().mean().item()
    if name in FEWER[backend, tokens > 16]:
        assert differing > 0.2
        truth = getattr(reference, op)(*(mapped(Tensor.double, x) for x in args))
        truth = truth[0] if isinstance(truth, tuple) else truth
        assert_as_close_as(out, expected, truth)
        errors = [(each.double() - truth).square().mean() for each in (out, expected)]
        assert errors[0] < errors[1]  # a rounding less
    else:
        assert differing <= DIFFERING
