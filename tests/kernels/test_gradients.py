"""Gradients of the ops: formulas, autograd registration, torch.compile, a layer, and the memory that the layer
keeps."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from support.models import renumbered
from support.references import random
from support.tolerances import assert_as_close_as, assert_same_formula
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.fx.experimental.proxy_tensor import make_fx

from qwenkern import kernels
from qwenkern.kernels import reference

EPS = 1e-6
POSITIONS = [4, 0, 3]
TOKENS = len(POSITIONS)


def _arguments(name, dtype, device):
    """Of the op: everything that can have a gradient, but for the table, requires one."""

    def leaf(*shape: int, seed: int) -> Tensor:
        return random(*shape, dtype=dtype, device=device, seed=seed).requires_grad_()

    angles = torch.arange(6)[:, None] / 10000 ** (torch.arange(0, 16, 2) / 16)
    table = torch.cat((angles.cos(), angles.sin()), dim=-1).to(
        device, max(dtype, torch.float32, key=lambda d: d.itemsize)
    )
    positions = torch.tensor(POSITIONS, device=device)
    x, residual, weight = leaf(TOKENS, 24, seed=1), leaf(TOKENS, 24, seed=2), leaf(24, seed=3)
    heads = leaf(TOKENS, 3, 16, seed=4), leaf(TOKENS, 1, 16, seed=5)
    return {
        "rms_norm": (x, weight, EPS),
        "add_rms_norm": (x, residual, weight, EPS),
        "add_rms_norm, first": (x, None, weight, EPS),
        "apply_rope": (*heads, table, positions),
        "apply_rope, inverse": (*heads, table, positions, True),
        "swiglu": (leaf(TOKENS, 14, seed=6),),
        "silu_mul": (leaf(TOKENS, 7, seed=7), leaf(TOKENS, 7, seed=8)),
    }[name]


NAMES = ["rms_norm", "add_rms_norm", "add_rms_norm, first", "apply_rope", "apply_rope, inverse", "swiglu", "silu_mul"]


def _tuple(outs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outs,) if isinstance(outs, Tensor) else outs


def _gradients(function, arguments, seeds=(10, 11)):
    """Of everything that requires one, for random gradients of the results; a seed of None leaves a result unused."""
    outs = [(out, seed) for out, seed in zip(_tuple(function(*arguments)), seeds, strict=False) if seed is not None]
    backs = [random(*out.shape, dtype=out.dtype, device=out.device, seed=seed) for out, seed in outs]
    leaves = [each for each in arguments if isinstance(each, Tensor) and each.requires_grad]
    return torch.autograd.grad([out for out, _ in outs], leaves, backs, allow_unused=True)


def _widened(arguments):
    """In float64, leaves of their own."""
    return [
        each.detach().double().requires_grad_(each.requires_grad)
        if isinstance(each, Tensor) and each.is_floating_point()
        else each
        for each in arguments
    ]


@pytest.mark.parametrize("name", NAMES)
def test_numerical_gradients(name):
    """Of the registered op, by differences, in float64."""
    op = getattr(torch.ops.qwenkern, name.split(",")[0])
    assert torch.autograd.gradcheck(op, _arguments(name, torch.float64, torch.device("cpu")))


@pytest.mark.parametrize("name", NAMES)
def test_the_formulas_are_those_of_autograd(name):
    """The gradients of the reference in float64."""
    arguments, op = _arguments(name, torch.float64, torch.device("cpu")), name.split(",")[0]
    ours = _gradients(getattr(torch.ops.qwenkern, op), arguments)
    for out, expected in zip(ours, _gradients(getattr(reference, op), arguments), strict=True):
        assert_same_formula(out, expected)


@pytest.mark.parametrize("choice", ["triton", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_the_public_functions(ops, device, monkeypatch, name, dtype, choice):
    """The gradients are as close to float64's as autograd's through the reference, which rounds intermediate
    results."""
    monkeypatch.setenv("QWENKERN_KERNELS", choice)
    arguments, op = _arguments(name, dtype, device), name.split(",")[0]
    truths = _gradients(getattr(reference, op), _widened(arguments))
    peers = _gradients(getattr(reference, op), arguments)
    for out, peer, truth in zip(_gradients(getattr(ops, op), arguments), peers, truths, strict=True):
        assert out.dtype == dtype
        assert_as_close_as(out, peer, truth)


@pytest.mark.parametrize("name", ["add_rms_norm", "add_rms_norm, first", "apply_rope"])
@pytest.mark.parametrize("seeds", [(10, None), (None, 11)])
def test_a_result_that_is_not_used(ops, device, name, seeds):
    arguments, op = _arguments(name, torch.float32, device), name.split(",")[0]
    ours = _gradients(getattr(ops, op), arguments, seeds)
    truths = _gradients(getattr(reference, op), _widened(arguments), seeds)
    peers = _gradients(getattr(reference, op), arguments, seeds)
    for out, peer, truth in zip(ours, peers, truths, strict=True):
        if truth is None:  # ours may say so, too, or that it is 0
            assert out is None or not out.any()
        else:
            assert_as_close_as(out, peer, truth)


def test_both_summands_accumulate_apart(ops, device):
    """They get one tensor as their gradient, which must not become the memory of both."""
    x, residual, weight, eps = _arguments("add_rms_norm", torch.float32, device)
    for _ in range(2):
        normed, new = ops.add_rms_norm(x, residual, weight, eps)
        (normed.square().sum() + new.sum()).backward()
    assert torch.equal(x.grad, residual.grad)
    residual.grad.zero_()
    assert x.grad.any()


def test_gradients_of_any_layout(ops, device):
    """As sum() sends them, of stride 0, and transposed."""
    (gate_up,), (x, weight, eps) = (_arguments(name, torch.float32, device) for name in ("swiglu", "rms_norm"))
    q, k, *places = _arguments("apply_rope", torch.float32, device)
    for leaf, out in ((gate_up, ops.swiglu(gate_up)), (x, ops.rms_norm(x, weight, eps))):
        (ours,) = torch.autograd.grad(out.sum(), leaf, retain_graph=True)
        assert torch.equal(ours, torch.autograd.grad(out, leaf, torch.ones_like(out))[0])
    back = random(16, 3, TOKENS, dtype=torch.float32, device=device).permute(2, 1, 0)
    ours, expected = (
        torch.autograd.grad(ops.apply_rope(q, k, *places)[0], q, each)[0] for each in (back, back.contiguous())
    )
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm", "swiglu", "silu_mul"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_no_rows(ops, device, name, dtype):
    """What an expert that no token chose is given."""
    arguments = [
        each.detach()[:0].requires_grad_() if isinstance(each, Tensor) and each.dim() == 2 else each
        for each in _arguments(name, dtype, device)
    ]
    with torch.no_grad():
        outs = _tuple(getattr(ops, name)(*arguments))
    assert all(out.shape[0] == 0 and out.dtype == dtype for out in outs)
    for found in _gradients(getattr(ops, name), arguments):
        assert found.numel() == 0 or torch.equal(found, torch.zeros(24, dtype=dtype, device=device))


def test_frozen_weights_and_inputs(ops, device):
    x, residual, weight, eps = _arguments("add_rms_norm", torch.float32, device)
    both = _gradients(ops.add_rms_norm, (x, residual, weight, eps))
    frozen = _gradients(ops.add_rms_norm, (x, residual, weight.detach(), eps))
    assert all(torch.equal(*pair) for pair in zip(frozen, both[:2], strict=True))
    (alone,) = _gradients(ops.add_rms_norm, (x.detach(), residual.detach(), weight, eps))
    assert torch.equal(alone, both[2])


def test_no_graph_without_gradients(ops, device):
    arguments = _arguments("rms_norm", torch.float32, device)
    with torch.no_grad():
        assert ops.rms_norm(*arguments).grad_fn is None


@pytest.mark.parametrize("name", NAMES)
def test_registrations(ops, device, name):
    """Schema, autograd, shapes and compilation, with inputs that require gradients."""
    op = getattr(torch.ops.qwenkern, name.split(",")[0])
    torch.library.opcheck(op, _arguments(name, torch.float32, device))


@pytest.mark.parametrize("name", NAMES)
def test_registrations_of_folded_batches(ops, device, monkeypatch, name):
    """[batch, tokens] exchanged, also on the reference: the result has the strides that the compiler was told."""
    arguments = _arguments(name, torch.float32, device)
    if not name.startswith("apply_rope"):
        folded = [
            torch.stack((each.detach(), each.detach())).transpose(0, 1).requires_grad_()
            if isinstance(each, Tensor) and each.dim() > 1
            else each
            for each in arguments
        ]
    else:
        folded = [each.detach().transpose(0, 1).contiguous().transpose(0, 1) for each in arguments[:2]]
        folded = [*(each.requires_grad_() for each in folded), *arguments[2:]]
    for choice in ("triton", "reference"):
        monkeypatch.setenv("QWENKERN_KERNELS", choice)
        torch.library.opcheck(getattr(torch.ops.qwenkern, name.split(",")[0]), tuple(folded))


def _block(ops, x, residual, weight, qkv, gate_up, cos_sin, positions):
    """Every op with a gradient, one after the other."""
    normed, residual = ops.add_rms_norm(x, residual, weight, EPS)
    q, k, v = (normed @ qkv).view(TOKENS, 4, 16).split((2, 1, 1), dim=1)
    q, k = ops.apply_rope(q, k, cos_sin, positions)
    x = (q * k + v).flatten(1)
    normed, residual = ops.add_rms_norm(ops.rms_norm(x, weight, EPS), residual, weight, EPS)
    packed = normed @ gate_up
    return ops.swiglu(packed) + ops.silu_mul(*packed.chunk(2, dim=-1)) + residual


def test_compiled_without_graph_breaks(ops, device):
    _, _, table, positions = _arguments("apply_rope", torch.float32, device)
    shapes = [(TOKENS, 32), (TOKENS, 32), (32,), (32, 64), (32, 64)]
    leaves = [
        random(*shape, dtype=torch.float32, device=device, seed=seed).requires_grad_()
        for seed, shape in enumerate(shapes)
    ]
    torch.compiler.reset()
    compiled = torch.compile(_block, backend="aot_eager", fullgraph=True)
    expected = _gradients(_block, (ops, *leaves, table, positions))
    for out, eager in zip(_gradients(compiled, (ops, *leaves, table, positions)), expected, strict=True):
        assert torch.equal(out, eager)


def _layer(ops, layer, x, cos_sin, positions):
    """transformers' layer over one sequence [T, H], by our ops and the layer's own projections."""
    attention, mlp, eps = layer.self_attn, layer.mlp, layer.input_layernorm.variance_epsilon
    normed, residual = ops.add_rms_norm(x, None, layer.input_layernorm.weight, eps)
    projections = attention.q_proj, attention.k_proj, attention.v_proj
    q, k, v = (project(normed).view(len(x), -1, attention.head_dim) for project in projections)
    q, k = ops.apply_rope(q, k, cos_sin, positions)
    q, k, v = (each.transpose(0, 1)[None] for each in (q, k, v))
    attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    x = attention.o_proj(attended[0].transpose(0, 1).flatten(1))
    normed, residual = ops.add_rms_norm(x, residual, layer.post_attention_layernorm.weight, eps)
    return residual + mlp.down_proj(ops.silu_mul(mlp.gate_proj(normed), mlp.up_proj(normed)))


@pytest.fixture
def layers():
    """A layer of transformers and its input, in a dtype: function(dtype) -> (layer, x [T, H], cos_sin, positions)."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

    config = transformers.Qwen2Config(
        hidden_size=64,
        intermediate_size=344,  # 5.4 times the hidden size, as in 3B
        num_attention_heads=4,
        num_key_value_heads=1,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    state = Qwen2DecoderLayer(config, 0).state_dict()
    state = {name: tensor + 0.3 * torch.randn_like(tensor) for name, tensor in state.items()}

    def make(dtype: torch.dtype, tokens: int = 12) -> tuple[torch.nn.Module, Tensor, Tensor, Tensor]:
        layer = Qwen2DecoderLayer(config, 0)
        layer.load_state_dict(state)
        positions = torch.arange(tokens)
        angles = positions[:, None] / 10000 ** (torch.arange(0, 16, 2) / 16)
        cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1)
        x = random(tokens, 64, dtype=torch.float32, device=torch.device("cpu"))
        return layer.to(dtype), x.to(dtype).requires_grad_(), cos_sin, positions

    return make


def _theirs(layer, x, cos_sin, positions):
    cos, sin = (torch.cat((half, half), dim=-1)[None].to(x.dtype) for half in cos_sin.chunk(2, dim=-1))
    return layer(x[None], position_ids=positions[None], position_embeddings=(cos, sin))[0]


@pytest.mark.processor
def test_gradients_of_a_layer(ops, layers):
    """The gradients of the input and of every parameter, compared with those of transformers' layer, with its sums in
    several orders and in float64."""

    def gradients(function, dtype, order):
        layer, x, *places = layers(dtype)
        for name, parameter in layer.named_parameters():
            parameter.data = renumbered(name, parameter.data, order)
        x = x.detach()[:, order].requires_grad_()
        out = function(layer, x, *places)
        out.square().sum().backward()
        back = order.argsort()
        found = {name: renumbered(name, each.grad, back) for name, each in layer.named_parameters()}
        return found | {"out": out.detach()[:, back], "x": x.grad[:, back]}

    orders = [torch.arange(64), *(torch.randperm(64, generator=torch.Generator().manual_seed(n)) for n in range(7))]
    truth, other = (gradients(_theirs, torch.float64, order) for order in orders[:2])
    peers = [gradients(_theirs, torch.float32, order) for order in orders]
    for name, ours in gradients(partial(_layer, ops), torch.float32, orders[0]).items():
        assert_as_close_as(other[name].float(), peers[0][name], truth[name])  # in any order it is the same function
        assert_as_close_as(ours, [peer[name] for peer in peers], truth[name])


def test_less_is_kept_for_the_backward_pass(layers, capsys):
    """Than by transformers' layer, in bytes of distinct storages; parameters and the input are there anyway."""

    def kept(function) -> int:
        layer, x, *places = layers(torch.bfloat16, tokens=128)
        there = {each.untyped_storage().data_ptr() for each in (*layer.parameters(), x, *places)}
        storages = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in there:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with saved_tensors_hooks(note, lambda tensor: tensor):
            out = function(layer, x, *places)
        assert out.requires_grad  # the graph lives, and so do its storages: no address is used twice
        return sum(storages.values())

    ours, theirs = kept(lambda *given: _layer(kernels, *given)), kept(_theirs)
    with capsys.disabled():
        print(f"\nkept for the backward pass: {ours:,} bytes, by transformers {theirs:,}: {ours / theirs:.2f} times")
    assert ours < 0.75 * theirs


@pytest.mark.parametrize("choice", ["triton", "reference"])
def test_whoever_follows_tensors_sees_the_ops(monkeypatch, choice):
    """A launcher's work is invisible to tracers, so the op must be what they meet, in C as well."""
    monkeypatch.setenv("QWENKERN_KERNELS", choice)
    monkeypatch.setattr("qwenkern.kernels.triton.backend.INTERPRETED", False)  # C runs
    x, other, weight = (torch.randn(*shape).bfloat16() for shape in ((3, 32), (3, 32), (32,)))

    def norm(x):
        return kernels.rms_norm(x, weight, 1e-6)

    traced = torch.jit.trace(norm, (x,), check_trace=False)
    assert torch.equal(traced(other), norm(other))
    graph = make_fx(norm)(x)
    assert torch.equal(graph(other), norm(other))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert norm(mode.from_tensor(x)).shape == x.shape
    assert torch.equal(torch.vmap(norm)(x), norm(x))
    assert torch.equal(norm(torch._neg_view(x)), norm(-x))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        norm(forward_ad.make_dual(x, other))


def test_fakes_leave_the_number_of_rows_open():
    """A graph for any number of rows has no condition on it, and no number of its own."""
    weight, norm, table, eps = torch.randn(48, 16), torch.ones(16), torch.randn(9, 4), 1e-6
    pages = torch.zeros(2, 4, 1, 4)

    class EveryOp(torch.nn.Module):
        def forward(self, x, ids):
            wide = kernels.linear(x, weight)
            heads = wide.unflatten(1, (-1, 4))
            return (
                wide,
                kernels.linear(x, weight, addend=wide),
                kernels.norm_linear(x, norm, eps, weight),
                kernels.norm_swiglu_linear(x, norm, eps, weight),
                kernels.lm_head(x, norm, eps, weight),
                *kernels.lm_head_top_k(x, norm, eps, weight, 3),
                *kernels.add_rms_norm(x, x, norm, eps),
                kernels.swiglu(wide),
                kernels.silu_mul(wide, wide),
                *kernels.apply_rope(heads, heads, table, ids),
                kernels.embedding(ids, weight),
                kernels.rope_and_cache(wide, ids, table, (pages.clone(), pages.clone()), ids),
                kernels.norm_qkv_rope(x, norm, eps, weight, None, ids, table, (pages.clone(), pages.clone()), ids),
                *kernels.layers.angles(wide[None], wide[None], x.shape[0]),
            )

    def inputs(rows):
        return torch.randn(rows, 16), torch.arange(rows)

    rows = torch.export.Dim("rows", max=8)
    program = torch.export.export(EveryOp(), inputs(3), dynamic_shapes=({0: rows}, {0: rows}))
    given = inputs(5)
    for out, expected in zip(program.module()(*given), EveryOp()(*given), strict=True):
        torch.testing.assert_close(out, expected)
