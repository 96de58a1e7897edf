"""Blocks of a GGUF file repacked to our layout: the values of the gguf library, bit for bit, in C and in torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("gguf")
from checkpoint.test_dequantize import _HALVES, Q, random_blocks
from gguf import GGML_QUANT_SIZES
from gguf.quants import dequantize as oracle

from qwenkern.checkpoint import repack as room
from qwenkern.checkpoint.blocks import format_of
from qwenkern.checkpoint.repack import Task, repack
from qwenkern.errors import CheckpointError
from qwenkern.kernels.c import build, threads
from qwenkern.kernels.weights import Grouped

COLUMNS = 512
every_kind = pytest.mark.parametrize("kind", _HALVES, ids=lambda kind: kind.name)


def blocks_of(kind: Q, rows: int, seed: int = 0) -> np.ndarray:
    return random_blocks(kind, rows * COLUMNS // GGML_QUANT_SIZES[kind][0], seed)


def repacked(blocks: np.ndarray, kind: Q, weight: Grouped) -> Grouped:
    repack([Task(blocks, kind, weight, "w")])
    return weight


def allocated(kind: Q, rows: int) -> Grouped:
    form = format_of(kind)
    assert form is not None
    return form.allocate(rows, COLUMNS, torch.float32, lambda shape, dtype: torch.full(shape, 77).to(dtype))


@every_kind
@pytest.mark.parametrize("where", ["C", "torch"])
@pytest.mark.parametrize("rows", [16, 80])
def test_a_weight_has_the_values_of_the_gguf_library(kind, where, rows, monkeypatch):
    if where == "torch":
        monkeypatch.setattr(build, "prepare", lambda: "no C")
        monkeypatch.setattr(room, "_CHUNK", 32 * COLUMNS)
    blocks = blocks_of(kind, rows)
    blocks.flags.writeable = False
    weight = repacked(blocks, kind, allocated(kind, rows))
    expected = torch.from_numpy(oracle(blocks.reshape(rows, -1), kind))
    assert torch.equal(weight.dequantise().view(torch.int32), expected.view(torch.int32))
    weight.check("repack", "weight", (rows, COLUMNS))


@every_kind
def test_c_and_torch_agree_in_every_byte(kind, monkeypatch):
    blocks = blocks_of(kind, 48, seed=1)
    in_c = repacked(blocks, kind, allocated(kind, 48))
    monkeypatch.setattr(threads, "count", lambda: 3)
    in_three = repacked(blocks, kind, allocated(kind, 48))
    monkeypatch.setattr(build, "prepare", lambda: "no C")
    in_torch = repacked(blocks, kind, allocated(kind, 48))
    for one, other, third in zip(in_c.tensors, in_torch.tensors, in_three.tensors, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, third)


@every_kind
def test_resident_bytes_are_near_those_of_the_file(kind):
    blocks = blocks_of(kind, 16)
    most = {Q.Q2_K: 1.96, Q.Q3_K: 1.33}.get(kind, 1.03)  # those two are widened to 4 bits
    assert blocks.nbytes <= repacked(blocks, kind, allocated(kind, 16)).nbytes <= most * blocks.nbytes


@pytest.mark.parametrize("missing", [1, 22])
def test_bytes_that_do_not_fill_the_matrix_are_refused(missing):
    blocks = blocks_of(Q.Q5_0, 16).reshape(-1)[missing:]
    with pytest.raises(
        CheckpointError, match=rf"w: .* of Q5_0 for a matrix \[16, {COLUMNS}\]; expected 5632 uint8: 22 for "
    ):
        repacked(blocks, Q.Q5_0, allocated(Q.Q5_0, 16))


@every_kind
@pytest.mark.parametrize("where", ["C", "torch"])
def test_scales_that_are_not_finite_are_refused(kind, where, monkeypatch):
    if where == "torch":
        monkeypatch.setattr(build, "prepare", lambda: "no C")
    for at in _HALVES[kind]:
        for wrong in (np.nan, np.inf, -np.inf):
            blocks = blocks_of(kind, 48)
            blocks[-5, at : at + 2] = np.array([wrong], np.float16).view(np.uint8)
            with pytest.raises(CheckpointError, match=rf"^w: {kind.name} blocks with scales that are NaN or infinite"):
                repacked(blocks, kind, allocated(kind, 48))


def test_a_message_names_the_weight_that_is_wrong_and_all_are_checked_first():
    blocks = [blocks_of(Q.Q8_0, 16, seed) for seed in range(3)]
    blocks[1][3, :2] = np.array([np.nan], np.float16).view(np.uint8)
    tasks = [Task(each, Q.Q8_0, allocated(Q.Q8_0, 16), f"w{i}") for i, each in enumerate(blocks)]
    with pytest.raises(CheckpointError, match=r"^w1: Q8_0 blocks with scales"):
        repack(tasks)
    with pytest.raises(CheckpointError, match=r"^w2: .* of Q8_0 for a matrix"):
        repack([*tasks[:2], tasks[2]._replace(blocks=blocks[2].reshape(-1)[1:])])
