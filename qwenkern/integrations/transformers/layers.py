"""The layers of transformers' Qwen2, Llama and Mistral on qwenkern's kernels: RMSNorm, MLP, attention, decoder layer.

A patch changes the class of a module to a subclass of this class, with one of the forward methods below.

    Qwen2RMSNorm  ->  class Qwen2RMSNorm(layers.RMSNorm, Qwen2RMSNorm)

Nothing is stored in the instance. So a copy of a module (by copy, pickle or DataParallel) computes with its own
weights, isinstance() is still true, and super() has transformers' own forward."""

from __future__ import annotations

import sys
import types
from typing import Any

import torch
from torch import Tensor, nn

from ... import kernels as ops
from ...kernels.triton_if_any import INTERPRETED

FEW = 1 << 15  # values; with fewer, torch's own operations on a CPU are as fast as qwenkern's
_classes: dict[tuple, type[Patched]] = {}  # by original class, kind and switches


class Patched(nn.Module):
    """The common base of the patched classes."""

    original: type[nn.Module]  # the class that the module had
    how: tuple[tuple[str, bool], ...]  # the switches of its forward

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """For copy and pickle: refers to the original class, because a class made here cannot be imported."""
        reduced: Any = super().__reduce_ex__(protocol)
        make, arguments, *state = reduced
        patch = type(self)
        if "original" in vars(patch):
            make, arguments = _new, (patch.original, patch.__mro__[1], patch.how)
        return make, arguments, *state


def patched(original: type[nn.Module], kind: type[Patched], **switches: bool) -> type[Patched]:
    """The subclass of ``original`` with the forward of ``kind``. Each is made once."""
    how = tuple(switches.items())
    if (original, kind, how) not in _classes:
        namespace = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
        namespace |= {"original": original, "how": how, **switches}
        namespace["modeling"] = sys.modules[
            original.forward.__module__
        ]  # the module whose functions the original class calls
        # the same name, because other code selects classes by name; setdefault, because another thread may be faster
        _classes.setdefault((original, kind, how), type(original.__name__, (kind, original), namespace))
    return _classes[original, kind, how]


def _new(original: type[nn.Module], kind: type[Patched], how: tuple[tuple[str, bool], ...]) -> Patched:
    made = patched(original, kind, **dict(how))
    return made.__new__(made)


def patch_of(module: nn.Module) -> type[Patched] | None:
    """The patched class of a module, or the patched class that other code derived the module's class from."""
    return next((each for each in type(module).__mro__ if "original" in vars(each) and issubclass(each, Patched)), None)


class RMSNorm(Patched):
    """RMSNorm in one kernel."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        # With autocast, the product has the wider dtype.
        if not _pays(hidden_states) or hidden_states.dtype != self.weight.dtype:
            return super().forward(hidden_states)
        return ops.rms_norm(_dense(hidden_states), self.weight, self.variance_epsilon)


class MLP(Patched):
    """silu(gate) * up in one kernel, between the module's own projections."""

    act_fn: nn.Module
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        if not _pays(x) or _has_hooks(self.act_fn):
            return super().forward(x)
        return self.down_proj(ops.silu_mul(_dense(self.gate_proj(x)), _dense(self.up_proj(x))))


class DecoderLayer(Patched):
    """A decoder layer whose first addition is fused with the norm after it."""

    input_layernorm: nn.Module
    self_attn: nn.Module
    post_attention_layernorm: Any  # a norm, or what wraps one
    mlp: nn.Module

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **keywords: Any,
    ) -> Tensor:
        keywords |= {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            "position_embeddings": position_embeddings,
        }
        if not _pays(hidden_states):
            return super().forward(hidden_states, **keywords)
        residual = _dense(hidden_states)
        hidden_states, _ = self.self_attn(hidden_states=self.input_layernorm(residual), **keywords)
        norm = self.post_attention_layernorm
        if _has_hooks(norm) or not is_norm(norm) or not hidden_states.dtype == residual.dtype == norm.weight.dtype:
            # Hooks of the norm need its input and output. autocast mixes dtypes.
            residual = residual + hidden_states
            hidden_states = norm(residual)
        else:
            hidden_states, residual = ops.add_rms_norm(
                _dense(hidden_states), residual, norm.weight, norm.variance_epsilon
            )
        return residual + self.mlp(hidden_states)


class Attention(Patched):
    """An attention module with its own projections and cache. Rotary embedding and attention run on qwenkern's kernels,
    or as in the original module if they are switched off."""

    modeling: types.ModuleType
    rotates: bool
    attends: bool
    config: Any
    layer_idx: int
    head_dim: int
    scaling: float
    attention_dropout: float
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **keywords: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if not _pays(hidden_states):
            return super().forward(hidden_states, position_embeddings, attention_mask, past_key_values, **keywords)
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (_dense(project(hidden_states)).view(shape) for project in (self.q_proj, self.k_proj, self.v_proj))
        if self.rotates:
            flat = q.flatten(0, 1), k.flatten(0, 1)
            flat = ops.apply_rope(*flat, *_table(*position_embeddings, flat[0].shape[0], self.layer_idx == 0))
            q, k = (each.view(shape).transpose(1, 2) for each in flat)
        else:
            q, k = self.modeling.apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), *position_embeddings)
        v = v.transpose(1, 2)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        implementation = self.config._attn_implementation
        if self.attends and implementation == "sdpa":
            attend = attention_forward
        else:
            others = self.modeling.ALL_ATTENTION_FUNCTIONS
            attend = others.get_interface(implementation, self.modeling.eager_attention_forward)
        window = (
            self.sliding_window if hasattr(self, "sliding_window") else getattr(self.config, "sliding_window", None)
        )
        out, weights = attend(
            self,
            q,
            k,
            v,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=window,
            **keywords,
        )
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: query [B, Hq, Tq, D], key and value [B, Hkv, Tk, D], out [B, Tq, Hq, D].

    Plain causal attention runs on qwenkern's kernel. torch's attention runs with a mask (padding, sliding windows,
    packed sequences), dropout or a gradient, and on a CPU. It raises for arguments that it does not support."""
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    plain = (
        attention_mask is None and not dropout and causal and not any(keywords.get(name) is not None for name in _EXTRA)
    )
    wants_gradient = torch.is_grad_enabled() and any(each.requires_grad for each in (query, key, value))
    if not plain or wants_gradient or not (query.is_cuda or INTERPRETED):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **keywords
        )
    queries = query.shape[2]
    if queries > 1:  # an empty static cache: there is no mask, and positions after the prompt must not be read
        key, value = key[:, :, :queries], value[:, :, :queries]
    return ops.attention(query, key, value, query.shape[3] ** -0.5 if scaling is None else scaling), None


_EXTRA = ("position_bias", "cache", "softcap", "s_aux")  # arguments that change the result


def is_norm(module: nn.Module) -> bool:
    """Whether the module is a plain norm. A norm that an adapter wraps is not, because it does more."""
    return type(module).__name__.endswith("RMSNorm")


def _table(cos: Tensor, sin: Tensor, num_tokens: int, first: bool) -> tuple[Tensor, Tensor]:
    """transformers' cosines and sines in the layout of qwenkern's kernel. The ``first`` layer of a forward pass makes
    the table for all layers. It is stored as an attribute of the cosines, and freed with them."""
    if torch.compiler.is_compiling():  # the compiler merges the equal work of the layers
        return ops.layers.angles(cos, sin, num_tokens)
    state = sin, num_tokens, *(None if each.is_inference() else each._version for each in (cos, sin))
    kept = None if first else cos.__dict__.get("_qwenkern_table")
    if kept is None or kept[0][0] is not sin or kept[0][1:] != state[1:]:
        cos.__dict__["_qwenkern_table"] = kept = state, ops.layers.angles(cos, sin, num_tokens)
    return kept[1]


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module does more than its forward: torch has hooks, or accelerate, whose hook may load the
    weight first."""
    own = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(own) or hasattr(module, "_hf_hook")


def _pays(x: Tensor) -> bool:
    """Whether qwenkern's kernel is faster than transformers' code, as it is except for few values on a CPU. If a
    compiler or an export leaves the size dynamic, the kernel runs, without a condition on the size."""
    if x.is_cuda or INTERPRETED:
        return True
    few = x.numel() < FEW
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        few = statically_known_true(few)
    return not few
