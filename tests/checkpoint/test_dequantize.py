"""Every block format against the gguf library's own dequantization, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("gguf")
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize as oracle

from qwenkern.checkpoint import dequantize as room
from qwenkern.checkpoint.blocks import format_of
from qwenkern.checkpoint.dequantize import dequantize, is_float, is_supported
from qwenkern.errors import CheckpointError

Q = GGMLQuantizationType
# bytes at which each type's blocks keep float16 numbers: scales and minima
_HALVES = {
    Q.Q4_0: [0],
    Q.Q4_1: [0, 2],
    Q.Q5_0: [0],
    Q.Q5_1: [0, 2],
    Q.Q8_0: [0],
    Q.Q2_K: [80, 82],
    Q.Q3_K: [108],
    Q.Q4_K: [0, 2],
    Q.Q5_K: [0, 2],
    Q.Q6_K: [208],
}
KINDS = [Q.F32, Q.F16, Q.BF16, *_HALVES]


def random_blocks(kind: Q, count: int, seed: int = 0) -> np.ndarray:
    """[count, bytes] of any codes, with finite scales: of any size, either sign, a third of them subnormal or zero."""
    random = np.random.default_rng(seed)
    if kind not in _HALVES:
        numbers = torch.from_numpy(random.standard_normal((count, 1)).astype(np.float32))
        dtype = {Q.F32: torch.float32, Q.F16: torch.float16, Q.BF16: torch.bfloat16}[kind]
        return numbers.to(dtype).view(torch.uint8).numpy()
    blocks = random.integers(0, 256, (count, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
    for at in _HALVES[kind]:
        bits = random.integers(0, 0x7C00, count, dtype=np.uint16)
        bits[: count // 3] &= 0x03FF
        bits |= random.integers(0, 2, count, dtype=np.uint16) << 15
        blocks[:, at : at + 2] = bits[:, None].view(np.uint8)
    return blocks


def test_every_supported_type_is_tested():
    assert set(KINDS) == {kind for kind in Q if is_float(kind) or format_of(kind)}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_float32_has_the_bits_of_the_gguf_library(kind):
    blocks = random_blocks(kind, 300)
    out = torch.full((300 * GGML_QUANT_SIZES[kind][0],), torch.nan)
    assert dequantize(blocks, kind, out, "w") is out
    assert torch.isfinite(out).all()
    assert np.array_equal(out.numpy().view(np.uint32), oracle(blocks.reshape(-1), kind).reshape(-1).view(np.uint32))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_are_the_float32_rounded_to_nearest_even(kind, dtype):
    blocks = random_blocks(kind, 300, seed=1)
    out = torch.full((300, GGML_QUANT_SIZES[kind][0]), torch.nan, dtype=dtype)
    dequantize(blocks, kind, out, "w")
    expected = torch.from_numpy(oracle(blocks.reshape(-1), kind).reshape(out.shape)).to(dtype)
    assert torch.equal(out.view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_chunks_meet_without_gap_or_overlap(kind, count, monkeypatch):
    block_size = GGML_QUANT_SIZES[kind][0]
    monkeypatch.setattr(room, "_CHUNK", 3 * block_size)
    blocks = random_blocks(kind, count, seed=2)
    buffer = torch.full((count + 2, block_size), torch.nan)
    dequantize(blocks, kind, buffer[1:-1], "w")
    assert np.array_equal(buffer[1:-1].numpy(), oracle(blocks.reshape(-1), kind).reshape(count, block_size))
    assert buffer[[0, -1]].isnan().all()


def test_read_only_blocks_are_read_without_a_warning(recwarn):
    torch.set_warn_always(True)  # else torch warns once in a process, perhaps in an earlier test
    try:
        blocks = random_blocks(Q.Q5_0, 1)
        blocks.flags.writeable = False
        dequantize(blocks, Q.Q5_0, torch.empty(32), "w")
        floats = np.frombuffer(b"\0\0\x80?", np.uint8)
        assert dequantize(floats, Q.F32, torch.empty(1), "w").item() == 1
    finally:
        torch.set_warn_always(False)
    assert not recwarn.list


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not is_float(kind)], ids=lambda kind: kind.name)
def test_scales_that_are_not_finite_are_refused(kind):
    for at in _HALVES[kind]:
        for wrong in (np.nan, np.inf, -np.inf):
            blocks = random_blocks(kind, 3)
            blocks[1, at : at + 2] = np.array([wrong], np.float16).view(np.uint8)
            with pytest.raises(CheckpointError, match=rf"^w: {kind.name} blocks with scales that are NaN or infinite"):
                dequantize(blocks, kind, torch.empty(3 * GGML_QUANT_SIZES[kind][0]), "w")


def test_scales_of_other_types_are_looked_at_too():
    blocks = np.ones((2, GGML_QUANT_SIZES[Q.IQ4_NL][1]), np.uint8)
    blocks[1, :2] = np.array([np.inf], np.float16).view(np.uint8)
    with pytest.raises(CheckpointError, match=r"^w: IQ4_NL blocks with scales that are NaN or infinite"):
        dequantize(blocks, Q.IQ4_NL, torch.empty(64), "w")


def test_torchs_threads_are_given_back():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        dequantize(random_blocks(Q.Q4_K, 1), Q.Q4_K, torch.empty(256), "w")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("kind", [Q.IQ4_NL, Q.IQ4_XS, Q.IQ2_XXS, Q.TQ1_0, Q.MXFP4], ids=lambda kind: kind.name)
def test_the_library_converts_the_others(kind):
    assert format_of(kind) is None
    blocks = np.random.default_rng(3).integers(0, 60, (20, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
    out = torch.full((20, GGML_QUANT_SIZES[kind][0]), torch.nan)
    dequantize(blocks, kind, out, "w")
    assert np.array_equal(out.numpy(), oracle(blocks, kind))


def test_unsupported_type_is_refused():
    assert not is_supported(Q.Q8_K)
    with pytest.raises(CheckpointError, match=r"w: type Q8_K is not supported; expected one of BF16, F16.*Q8_0"):
        dequantize(np.zeros(292, np.uint8), Q.Q8_K, torch.empty(256), "w")


@pytest.mark.parametrize("num_bytes", [0, 21, 23, 44])
def test_bytes_that_do_not_fill_the_output_are_refused(num_bytes):
    with pytest.raises(CheckpointError, match=rf"{num_bytes} uint8 of Q5_0 for 32 weights"):
        dequantize(np.zeros(num_bytes, np.uint8), Q.Q5_0, torch.empty(32), "w")
