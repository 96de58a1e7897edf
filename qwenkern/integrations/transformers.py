"""transformers models on our kernels, without a change to the code that uses them.

    apply_qwenkern(model)                                   a loaded model, in place; revert(model) undoes it
    register_attention()                                    then attn_implementation="qwenkern", as for any other

What is replaced is the `forward` of single modules (instances, never classes), so other models are left alone, and
parameters, state dict, hooks, device moves and PEFT's adapters stay what they were. Linear layers are called, not
replaced, so quantised ones work. Everything that is replaced has a gradient; attention falls back to torch's where one
is wanted, or where there is a mask. On a CPU few tokens run as transformers' own: there nothing is gained.
"""

from __future__ import annotations

import functools
import logging
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels as ops
from ..errors import RequestError

try:
    from ..kernels.dispatch import INTERPRETED
except ImportError:  # no Triton
    INTERPRETED = False

logger = logging.getLogger(__name__)
TESTED = ("5.17", "5.22")  # the first and the last minor version that the tests have run with
MODEL_TYPES = ("qwen2", "llama", "mistral")  # whose layers look alike
PIECES = ("rms_norm", "rope", "swiglu", "attention")
FEW = 1 << 15  # values below which, on a CPU, torch's own operations are as fast as calls of ours
_MARK = "_qwenkern"


@dataclass
class Patch:
    """What was done to a model."""

    pieces: frozenset[str]
    # module, our forward bound to it, and what accelerate had kept aside as the real one
    replaced: list[tuple[nn.Module, types.MethodType, Any]] = field(default_factory=list)

    def replace(self, module: nn.Module, function: Callable) -> None:
        if any(module is each for each, *_ in self.replaced):
            return  # layers may share a module
        if not (home := _origin(type(module).forward)).startswith("transformers.models."):
            raise RequestError(
                f"forward of {type(module).__name__} is that of {home}; expected transformers' own: undo "
                "the other patch, or switch the piece off"
            )
        hooked = hasattr(module, "_hf_hook")  # by accelerate, which calls what it keeps as _old_forward
        if not hooked and "forward" in module.__dict__:
            raise RequestError(
                f"forward of {type(module).__name__} was replaced already, by {_origin(module.forward)}; expected a "
                "model as transformers made it: undo the other patch first"
            )
        method = types.MethodType(function, module)
        self.replaced.append((module, method, module.__dict__.get("_old_forward")))
        setattr(module, "_old_forward" if hooked else "forward", method)

    def check(self) -> None:
        """Raises if somebody else has replaced one of ours since."""
        for module, method, _ in self.replaced:
            if _place(module, method) is None:
                found = module.__dict__.get("forward")
                raise RequestError(
                    f"forward of {type(module).__name__} was replaced after apply_qwenkern, by {_origin(found)}; undo "
                    "that first"
                )

    def restore(self) -> None:
        for module, method, kept in reversed(self.replaced):
            if _place(module, method) == "forward":
                del module.__dict__["forward"]
            else:  # under accelerate's hooks, which may have come before us or after
                module._old_forward = kept or types.MethodType(type(module).forward, module)


def _place(module: nn.Module, method: types.MethodType) -> str | None:
    """Where a module keeps this forward: accelerate moves it when hooks come and go."""
    return next((name for name in ("forward", "_old_forward") if module.__dict__.get(name) is method), None)


def apply_qwenkern(
    model: nn.Module, *, rms_norm: bool = True, rope: bool = True, swiglu: bool = True, attention: bool = True
) -> nn.Module:
    """Runs pieces of a loaded Qwen2, Llama or Mistral model of transformers on qwenkern's kernels; returns the model.

    In place, and again with other pieces as often as one likes; a model inside a wrapper (PEFT's, say) is found.
    rms_norm: RMSNorm, fused with the addition before it where a layer adds first. rope: rotary embedding of q and k.
    swiglu: silu(gate) * up. attention: with ``attn_implementation="sdpa"``, where there is neither mask nor gradient.

    Raises RequestError for a model of another kind, another activation, or one that something else patched."""
    _check_version()
    decoder = _decoder(model)
    pieces = frozenset(name for name, on in zip(PIECES, (rms_norm, rope, swiglu, attention), strict=True) if on)
    if decoder.__dict__.get(_MARK) is not None:
        if decoder.__dict__[_MARK].pieces == pieces:
            return model
        revert(model)
    _check_model(decoder, pieces)
    patch = Patch(pieces)
    try:
        _apply(decoder, patch)
    except RequestError:
        patch.restore()
        raise
    decoder.__dict__[_MARK] = patch
    return model


def revert(model: nn.Module) -> nn.Module:
    """Gives back what apply_qwenkern replaced; nothing happens to a model that it did not touch."""
    decoder = _decoder(model)
    patch = decoder.__dict__.get(_MARK)
    if patch is None:
        return model
    patch.check()
    patch.restore()
    del decoder.__dict__[_MARK]
    return model


def register_attention() -> None:
    """Makes ``attn_implementation="qwenkern"`` known to transformers, with the mask of "sdpa": True where a query may
    look. Without a mask of its own, left-padded batches would be silently wrong."""
    _check_version()
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register("qwenkern", attention_forward)
    AttentionMaskInterface.register("qwenkern", sdpa_mask)


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

    Our kernel where the attention is causal and nothing else; torch's with a mask (padding, sliding windows, packed
    sequences), dropout, a gradient, or on a CPU. What torch's does not take raises there."""
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
    if queries > 1:  # a static cache that was empty: without a mask, what comes behind the prompt is not to be seen
        key, value = key[:, :, :queries], value[:, :, :queries]
    return ops.attention(query, key, value, query.shape[3] ** -0.5 if scaling is None else scaling), None


_EXTRA = ("position_bias", "cache", "softcap", "s_aux")  # that change what is computed


def _apply(decoder: nn.Module, patch: Patch) -> None:
    tables = _Tables()
    implementation = decoder.config._attn_implementation
    attends = "attention" in patch.pieces and implementation == "sdpa"
    if "attention" in patch.pieces and implementation not in ("sdpa", "qwenkern"):
        _log_once(
            f"attention stays on {implementation!r}: load the model with attn_implementation='sdpa' to replace it"
        )
    for layer in decoder.layers:
        if "rms_norm" in patch.pieces:
            norms = [norm for norm in (layer.input_layernorm, layer.post_attention_layernorm) if _is_norm(norm)]
            for norm in norms:
                patch.replace(norm, _norm_forward)
            if len(norms) == 2:
                patch.replace(layer, _layer_forward)
        if "swiglu" in patch.pieces:
            if "silu" not in (found := type(layer.mlp.act_fn).__name__).lower():
                raise RequestError(f"act_fn of {type(layer.mlp).__name__} is a {found}; expected SiLU, or swiglu=False")
            patch.replace(layer.mlp, _mlp_forward)
        if "rope" in patch.pieces or attends:
            rotates = tables if "rope" in patch.pieces else None
            patch.replace(layer.self_attn, _attention_with(rotates, attends))
    if "rms_norm" in patch.pieces and _is_norm(decoder.norm):
        patch.replace(decoder.norm, _norm_forward)


def _is_norm(module: nn.Module) -> bool:
    """Not what an adapter has wrapped: that does more than normalise."""
    return type(module).__name__.endswith("RMSNorm")


def _norm_forward(self: nn.Module, hidden_states: Tensor) -> Tensor:
    # autocast: the product is of the wider dtype
    if not _pays(hidden_states) or hidden_states.dtype != self.weight.dtype:
        return type(self).forward(self, hidden_states)
    return ops.rms_norm(_dense(hidden_states), self.weight, self.variance_epsilon)


def _mlp_forward(self: nn.Module, x: Tensor) -> Tensor:
    if not _pays(x) or _has_hooks(self.act_fn):
        return type(self).forward(self, x)
    return self.down_proj(ops.silu_mul(_dense(self.gate_proj(x)), _dense(self.up_proj(x))))


def _layer_forward(
    self: nn.Module,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **keywords: Any,
) -> Tensor:
    """A decoder layer whose first addition is fused with the norm behind it."""
    keywords |= {
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        "past_key_values": past_key_values,
        "use_cache": use_cache,
        "position_embeddings": position_embeddings,
    }
    if not _pays(hidden_states):
        return type(self).forward(self, hidden_states, **keywords)
    residual = _dense(hidden_states)
    hidden_states, _ = self.self_attn(hidden_states=self.input_layernorm(residual), **keywords)
    norm = self.post_attention_layernorm
    if _has_hooks(norm) or not _is_norm(norm) or not hidden_states.dtype == residual.dtype == norm.weight.dtype:
        # whoever looks at the norm's input and output finds them; autocast mixes dtypes
        residual = residual + hidden_states
        hidden_states = norm(residual)
    else:
        hidden_states, residual = ops.add_rms_norm(_dense(hidden_states), residual, norm.weight, norm.variance_epsilon)
    return residual + self.mlp(hidden_states)


def _attention_with(tables: _Tables | None, attends: bool) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The forward of an attention module: its projections, our rotation (or its own), its cache, our attention (or the
    one that its config names). A closure, since torch 2.11's compiler takes no other callable for a method."""

    def forward(
        self: nn.Module,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **keywords: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if not _pays(hidden_states):
            return type(self).forward(
                self, hidden_states, position_embeddings, attention_mask, past_key_values, **keywords
            )
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (_dense(project(hidden_states)).view(shape) for project in (self.q_proj, self.k_proj, self.v_proj))
        modeling = sys.modules[type(self).__module__]
        if tables is None:
            q, k = modeling.apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), *position_embeddings)
        else:
            flat = q.flatten(0, 1), k.flatten(0, 1)
            flat = ops.apply_rope(*flat, *tables.of(*position_embeddings, len(flat[0])))
            q, k = (each.view(shape).transpose(1, 2) for each in flat)
        v = v.transpose(1, 2)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        implementation = self.config._attn_implementation
        if attends and implementation == "sdpa":
            attend = attention_forward
        else:
            attend = modeling.ALL_ATTENTION_FUNCTIONS.get_interface(implementation, modeling.eager_attention_forward)
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

    return forward


class _Tables:
    """transformers' cosines and sines as our kernel reads them, made once for all layers of a pass."""

    def __init__(self) -> None:
        self._kept: tuple[Tensor, Tensor, int, tuple[Tensor, Tensor]] | None = None

    def of(self, cos: Tensor, sin: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
        """angles, in kernels/layers.py, of these."""
        if torch.compiler.is_compiling():  # the compiler sees that the layers do the same
            return ops.layers.angles(cos, sin, num_tokens)
        kept = self._kept
        if kept is None or kept[0] is not cos or kept[1] is not sin or kept[2] != num_tokens:
            self._kept = kept = cos, sin, num_tokens, ops.layers.angles(cos, sin, num_tokens)
        return kept[3]


def _decoder(model: nn.Module) -> nn.Module:
    """The stack of layers inside a model, or inside what wraps it."""
    if not isinstance(model, nn.Module):
        raise RequestError(f"model is of type {type(model).__name__}; expected a transformers model")
    for module in model.modules():
        if isinstance(getattr(module, "layers", None), nn.ModuleList) and hasattr(module, "rotary_emb"):
            return module
    raise RequestError(f"{type(model).__name__} has no decoder layers; expected a Qwen2, Llama or Mistral model")


def _check_model(decoder: nn.Module, pieces: frozenset[str]) -> None:
    kind = getattr(getattr(decoder, "config", None), "model_type", None)
    if kind not in MODEL_TYPES:
        raise RequestError(f"{type(decoder).__name__} is of type {kind!r}; expected one of {', '.join(MODEL_TYPES)}")
    activation = decoder.config.hidden_act
    if "swiglu" in pieces and activation not in ("silu", "swish"):
        raise RequestError(f"the model's activation is {activation!r}; expected 'silu', or pass swiglu=False")
    for module in _touched(decoder):
        origin = _origin(module.forward)
        if origin.startswith("liger_kernel"):
            raise RequestError(
                f"{type(module).__name__} runs on Liger ({origin}) already; expected one patcher at a time"
            )


def _touched(decoder: nn.Module) -> Iterator[nn.Module]:
    for layer in decoder.layers:
        yield from (layer, layer.input_layernorm, layer.post_attention_layernorm, layer.mlp, layer.self_attn)
    yield decoder.norm


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _has_hooks(module: nn.Module) -> bool:
    """Whether more happens when the module is called than its forward: torch's hooks, or accelerate's, which may bring
    the weight first."""
    own = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(own) or hasattr(module, "_hf_hook")


def _origin(function: Any) -> str:
    return getattr(function, "__module__", None) or type(function).__module__


def _pays(x: Tensor) -> bool:
    """Whether ours is faster: not for few values on a CPU, where transformers' own runs then."""
    return x.is_cuda or INTERPRETED or x.numel() >= FEW


@functools.cache
def _log_once(text: str) -> None:
    logger.warning("qwenkern: %s", text)


@functools.cache
def _check_version() -> None:
    try:
        import transformers
    except ImportError as error:
        raise ImportError("qwenkern.integrations.transformers needs transformers: pip install transformers") from error
    found = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    first, last = (tuple(int(part) for part in version.split(".")) for version in TESTED)
    if found[0] != first[0]:
        raise ImportError(f"transformers is {transformers.__version__}; expected version {first[0]}")
    if not first <= found <= last:
        warnings.warn(
            f"qwenkern was tested with transformers {TESTED[0]} to {TESTED[1]}, and this is {transformers.__version__}",
            stacklevel=3,
        )
