"""The ops as layers, which Hugging Face's `kernels` library puts into other projects' modules."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from support.models import TINY, reference_model, tiny_model
from support.tolerances import assert_as_close_as
from torch import nn
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

import qwenkern.kernels
from qwenkern.kernels import layers, reference

hub = pytest.importorskip("kernels")
FOLDER = Path(qwenkern.kernels.__file__).parent
MAPPING = {
    name: {"cpu": hub.LocalLayerRepository(FOLDER, layer_name=layer)}
    for name, layer in {"RMSNorm": "RMSNorm", "SiluAndMul": "SiluAndMul", "rotary_pos_emb": "RotaryPosEmb"}.items()
}
DTYPES = [torch.bfloat16, torch.float32]
pytestmark = pytest.mark.processor


@hub.use_kernel_forward_from_hub("SiluAndMul")
class SiluAndMul(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(x[..., : x.shape[-1] // 2]) * x[..., x.shape[-1] // 2 :]


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.activation = Qwen2RMSNorm(64), SiluAndMul()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.norm(x))


def kernelized(module: nn.Module, mode: hub.Mode = hub.Mode.INFERENCE) -> nn.Module:
    with hub.use_kernel_mapping(MAPPING, inherit_mapping=False):
        return hub.kernelize(module, mode=mode, device="cpu", use_fallback=hub.KernelizeFallback.NO_LAYER)


@pytest.fixture
def rotary():
    """transformers' function, of which there is one for all models: it gets its own forward back."""
    yield modeling_qwen2.apply_rotary_pos_emb
    vars(modeling_qwen2.apply_rotary_pos_emb).pop("forward", None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_a_module_of_layers(dtype) -> None:
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    ours, theirs = kernelized(Tiny().to(dtype)), Tiny().to(dtype)
    for layer in (ours.norm, ours.activation):
        assert layer.forward.__func__.__module__ == "qwenkern_kernels.layers"
    assert_as_close_as(ours(x), theirs(x), theirs.double()(x.double()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_a_model_of_transformers(rotary, dtype) -> None:
    model = tiny_model(dtype=dtype)
    ids = torch.randint(TINY.vocab_size, (2, 50), generator=torch.Generator().manual_seed(0))
    theirs = reference_model(model)
    truth, peer = reference_model(model, torch.float64)(ids).logits, theirs(ids).logits
    written = theirs.generate(ids[:1], max_new_tokens=6, do_sample=False, pad_token_id=0)
    kernelized(theirs)
    assert theirs.model.norm.forward.__func__.__module__ == "qwenkern_kernels.layers"
    assert rotary.forward.__func__.__module__ == "qwenkern_kernels.layers"
    assert_as_close_as(theirs(ids).logits, peer, truth)
    if dtype == torch.float32:
        again = theirs.generate(ids[:1], max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert again.tolist() == written.tolist()


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("batch", [1, 3], ids=["angles for all", "angles of each"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotary_embedding(dtype, batch, dim) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(3, 5, heads, 32, generator=generator).to(dtype) for heads in (4, 2))
    q, k = (x.transpose(1, 2) if dim == 1 else x for x in (q, k))
    angles = torch.rand(batch, 5, 16, generator=generator).repeat(1, 1, 2) * 6
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    theirs = modeling_qwen2.apply_rotary_pos_emb
    truths = theirs(q.double(), k.double(), cos.double(), sin.double(), dim)
    outs = layers.RotaryPosEmb()(q, k, cos, sin, dim)
    for out, peer, truth in zip(outs, theirs(q, k, cos, sin, dim), truths, strict=True):
        assert_as_close_as(out, peer, truth)


def test_rotary_embedding_of_another_layout_is_refused() -> None:
    x = torch.zeros(1, 1, 1, 32)
    with pytest.raises(ValueError, match="unsqueeze_dim must be 1 or 2, and is 3"):
        layers.RotaryPosEmb()(x, x, x[0], x[0], 3)


def test_what_the_ops_refuse_is_computed_as_before() -> None:
    """A weight of another dtype, a turned tensor, nothing at all."""
    norm = Qwen2RMSNorm(64)
    mixed, turned, none = torch.randn(2, 64).bfloat16(), torch.randn(64, 3).t(), torch.zeros(0, 64)
    expected = [norm(x) for x in (mixed, turned, none)]
    kernelized(norm)
    for x, out in zip((mixed, turned, none), expected, strict=True):
        torch.testing.assert_close(norm(x), out)
    assert layers.SiluAndMul()(none).shape == (0, 32)


@pytest.mark.parametrize("layer", [layers.RMSNorm, layers.SiluAndMul, layers.RotaryPosEmb])
def test_a_layer_says_whether_its_op_has_a_gradient(layer) -> None:
    ops = {layers.RMSNorm: "rms_norm", layers.SiluAndMul: "swiglu", layers.RotaryPosEmb: "apply_rope"}
    assert layer.has_backward == getattr(qwenkern.kernels, ops[layer]).has_gradient


def test_training_takes_a_layer_only_where_there_is_a_gradient() -> None:
    x = torch.randn(3, 64)
    ours, theirs = Tiny(), Tiny()
    with hub.use_kernel_mapping(MAPPING, inherit_mapping=False):
        hub.kernelize(ours, mode=hub.Mode.TRAINING, device="cpu")
    for module in (ours, theirs):
        module(x).square().sum().backward()
    torch.testing.assert_close(ours.norm.weight.grad, theirs.norm.weight.grad)


@torch.no_grad()
def test_layers_compile_in_one_graph() -> None:
    module = kernelized(Tiny(), hub.Mode.INFERENCE | hub.Mode.TORCH_COMPILE)
    x = torch.randn(3, 64)
    compiled = torch.compile(copy.copy(module), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), module(x))
    assert torch.equal(compiled(x), reference.swiglu(reference.rms_norm(x, module.norm.weight, 1e-6)))
