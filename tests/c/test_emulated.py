"""The emulated library reports accesses of an op outside of its tensors."""

from __future__ import annotations

import pytest
import torch
from c import emulated
from torch import Tensor

from qwenkern.kernels.c import build, choose, ops
from qwenkern.kernels.c.calls import FIELDS, make
from qwenkern.kernels.c.recorded_calls import run


@pytest.fixture(autouse=True, params=["armv8.2-dotprod", "x86-64-v3"])
def in_c(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    emulated.use(request.param, request, monkeypatch)
    monkeypatch.delenv("QWENKERN_KERNELS", raising=False)
    monkeypatch.setattr(choose, "prefetch", lambda *_: 0)
    monkeypatch.setattr(choose, "prefetch_of_codes", lambda *_: 0)
    monkeypatch.setattr(choose, "multiplies", lambda *_: True)
    build.forget()
    yield
    build.forget()


def gate(columns: int) -> Tensor:
    return torch.ones(1, columns, dtype=torch.bfloat16)


def silu(out: Tensor, x: Tensor, columns: int) -> None:
    sizes = {"num_tokens": 1, "row_size": columns, "gate_stride": columns, "up_stride": columns}
    run(make.silu_mul(out=out, gate=x, up=x, **sizes), team=1)


def test_views_of_one_storage_keep_their_places():
    x = torch.randn(3, 100, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(
        ops.silu_mul(x[:, 10:40], x[:, 30:60]), ops.silu_mul(*(x[:, i : i + 30].clone() for i in (10, 30)))
    )


def test_what_is_read_behind_a_tensor_is_nan():
    out = gate(32)
    silu(out, gate(30), 32)
    assert out[0, :30].isfinite().all()
    assert out[0, 30:].isnan().all()


def test_what_an_op_leaves_out_is_nan():
    out = gate(32)
    silu(out, gate(32), 16)
    assert out[0, 16:].isnan().all()


def test_a_write_just_behind_a_tensor_is_found():
    with pytest.raises(AssertionError, match=r"outside of out of silu_mul, of 60 bytes"):
        silu(gate(30), gate(32), 32)


@pytest.mark.parametrize(("out", "x", "which"), [(32, 64, "out"), (64, 32, "gate")])
def test_a_page_away_from_a_tensor_nothing_can_be_touched(out: int, x: int, which: str):
    with pytest.raises(AssertionError, match=rf"touched byte 64 of {which} of silu_mul, which has 64 bytes"):
        silu(gate(out), gate(x), 64)
    silu(gate(32), gate(32), 32)  # by a new program


def test_an_input_must_not_change(monkeypatch: pytest.MonkeyPatch):
    fields = tuple(field._replace(is_const=True) for field in FIELDS["silu_mul"])
    monkeypatch.setitem(FIELDS, "silu_mul", fields)
    with pytest.raises(AssertionError, match=r"out of silu_mul was written to"):
        silu(gate(32), gate(32) * 2, 32)
