"""Runs transformers models on qwenkern's kernels, without a change to the code that uses them.

    apply_qwenkern(model)                                   a loaded model, in place; revert(model) undoes it
    register_attention()                                    adds the choice attn_implementation="qwenkern"

A patch replaces the class of single modules by a subclass (layers.py). So other models do not change, and parameters,
the state dict, hooks, device moves and PEFT's adapters work as before. Linear layers are not replaced, so quantised
linear layers work. All replacements have gradients; attention runs in torch if a gradient or a mask is needed. On a
CPU, few tokens run in transformers' own code, because the kernels would save no time."""

from __future__ import annotations

import functools
import logging
import types
import warnings
from collections.abc import Iterator
from typing import Any

from torch import nn

from ...errors import RequestError, shown
from . import layers
from .layers import attention_forward, is_norm, patch_of, patched

logger = logging.getLogger(__name__)
TESTED = ("5.17", "5.22")  # the first and the last minor version that is tested
MODEL_TYPES = ("qwen2", "llama", "mistral")  # types whose layers have the same structure
PIECES = ("rms_norm", "rope", "swiglu", "attention")


def apply_qwenkern(
    model: nn.Module, *, rms_norm: bool = True, rope: bool = True, swiglu: bool = True, attention: bool = True
) -> nn.Module:
    """Runs parts of a loaded Qwen2, Llama or Mistral model of transformers on qwenkern's kernels; returns the model.

    It works in place, also on a model inside a wrapper such as PEFT's. It may be called again with other switches.
    rms_norm: RMSNorm, fused with the addition before it if there is one. rope: rotary embedding of q and k. swiglu:
    silu(gate) * up. attention: with ``attn_implementation="sdpa"``, without mask and gradient.

    Raises RequestError for a model of another type, another activation, or a model with another patch. After any error
    or interrupt, all modules are unchanged."""
    _check_version()
    decoder = _decoder(model)
    pieces = frozenset(name for name, on in zip(PIECES, (rms_norm, rope, swiglu, attention), strict=True) if on)
    _check_model(decoder, pieces)
    _change(_originals(decoder) | dict(_wanted(decoder, pieces)))
    return model


def revert(model: nn.Module) -> nn.Module:
    """Undoes apply_qwenkern; a model without a patch does not change.

    Raises RequestError if another patch was applied afterwards. After any error, all modules are unchanged."""
    _change(_originals(_decoder(model)))
    return model


def register_attention() -> None:
    """Registers ``attn_implementation="qwenkern"`` with transformers, with the mask of "sdpa": True where a query may
    attend. Without a mask, left-padded batches would be silently wrong."""
    _check_version()
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register("qwenkern", attention_forward)
    AttentionMaskInterface.register("qwenkern", sdpa_mask)


def _wanted(decoder: Any, pieces: frozenset[str]) -> Iterator[tuple[nn.Module, type[nn.Module]]]:
    """The modules to replace, and the new class of each."""
    implementation = decoder.config._attn_implementation
    attends = "attention" in pieces and implementation == "sdpa"
    if "attention" in pieces and implementation not in ("sdpa", "qwenkern"):
        _log_once(
            f"attention stays on {shown(implementation)}: load the model with attn_implementation='sdpa' to replace it"
        )
    for layer in decoder.layers:
        if "rms_norm" in pieces:
            norms = [norm for norm in (layer.input_layernorm, layer.post_attention_layernorm) if is_norm(norm)]
            for norm in norms:
                yield norm, patched(_own_class(norm), layers.RMSNorm)
            if len(norms) == 2:
                yield layer, patched(_own_class(layer), layers.DecoderLayer)
        if "swiglu" in pieces:
            if "silu" not in (found := type(layer.mlp.act_fn).__name__).lower():
                raise RequestError(f"act_fn of {type(layer.mlp).__name__} is a {found}; expected SiLU, or swiglu=False")
            yield layer.mlp, patched(_own_class(layer.mlp), layers.MLP)
        if "rope" in pieces or attends:
            own = _own_class(layer.self_attn)
            yield layer.self_attn, patched(own, layers.Attention, rotates="rope" in pieces, attends=attends)
    if "rms_norm" in pieces and is_norm(decoder.norm):
        yield decoder.norm, patched(_own_class(decoder.norm), layers.RMSNorm)


def _own_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module without our patch. Raises RequestError if its forward is not transformers' own."""
    patch = patch_of(module)
    own = patch.original if patch else type(module)
    if not (home := _origin(own.forward)).startswith("transformers.models."):
        raise RequestError(
            f"forward of {own.__name__} is that of {home}; expected transformers' own: undo the other patch, or switch "
            "the piece off"
        )
    hooked = hasattr(module, "_hf_hook")  # accelerate calls the forward that it stores as _old_forward
    found = module.__dict__.get("_old_forward" if hooked else "forward")
    if found is not None and not _is_own(module, found):
        raise RequestError(
            f"forward of {own.__name__} was replaced already, by {_origin(found)}; expected a model as transformers "
            "made it: undo the other patch first"
        )
    return own


def _originals(decoder: nn.Module) -> dict[nn.Module, type[nn.Module]]:
    """The patched modules, and the original class of each."""
    return {module: patch.original for module in decoder.modules() if (patch := patch_of(module))}


def _change(classes: dict[nn.Module, type[nn.Module]]) -> None:
    """Gives each module its class. An error or interrupt undoes all changes."""
    before = {}
    for module, new in classes.items():
        if (patch_of(module) or type(module)) is not new:
            _check_top(module)
            before[module] = type(module)
    try:
        for module in before:
            _become(module, classes[module])
    except BaseException:
        for module, old in before.items():
            _become(module, old)
        raise


def _become(module: nn.Module, new: type[nn.Module]) -> None:
    """Changes a module's class, and the forward that accelerate has bound. A second call has no effect."""
    if _is_own(module, module.__dict__.get("forward")):
        module.__dict__.pop(
            "forward", None
        )  # accelerate stored it in the instance; a copy would compute with this module's weights
    if _is_own(module, module.__dict__.get("_old_forward")):
        module.__dict__["_old_forward"] = types.MethodType(new.forward, module)
    module.__class__ = new


def _check_top(module: nn.Module) -> None:
    """Raises RequestError if other code has replaced the class or the forward of a module since our patch."""
    patch = patch_of(module)
    if patch is None:
        return
    found = module.__dict__.get("_old_forward" if hasattr(module, "_hf_hook") else "forward")
    if type(module) is not patch or (found is not None and not _is_own(module, found)):
        by = _origin(found) if type(module) is patch else type(module).__module__
        raise RequestError(f"forward of {patch.__name__} was replaced after apply_qwenkern, by {by}; undo that first")


def _is_own(module: nn.Module, function: Any) -> bool:
    """Whether a function is the module's own forward, patched or not. accelerate stores it in the instance together
    with its hooks, and leaves it there when it removes them."""
    patch = patch_of(module)
    own = patch.original if patch else type(module)
    return (
        isinstance(function, types.MethodType)
        and function.__self__ is module
        and (function.__func__ is own.forward or _origin(function) == layers.__name__)
    )


def _decoder(model: nn.Module) -> nn.Module:
    """The stack of layers in a model, which may be inside a wrapper."""
    if not isinstance(model, nn.Module):
        raise RequestError(f"model is of type {type(model).__name__}; expected a transformers model")
    for module in model.modules():
        if isinstance(getattr(module, "layers", None), nn.ModuleList) and hasattr(module, "rotary_emb"):
            return module
    raise RequestError(f"{type(model).__name__} has no decoder layers; expected a Qwen2, Llama or Mistral model")


def _check_model(decoder: Any, pieces: frozenset[str]) -> None:
    kind = getattr(getattr(decoder, "config", None), "model_type", None)
    if kind not in MODEL_TYPES:
        raise RequestError(
            f"{type(decoder).__name__} is of type {shown(kind)}; expected one of {', '.join(MODEL_TYPES)}"
        )
    activation = decoder.config.hidden_act
    if "swiglu" in pieces and activation not in ("silu", "swish"):
        raise RequestError(f"the model's activation is {shown(activation)}; expected 'silu', or pass swiglu=False")
    for module in _touched(decoder):
        origin = _origin(module.forward)
        if origin.startswith("liger_kernel"):
            raise RequestError(
                f"{type(module).__name__} runs on Liger ({origin}) already; expected one patcher at a time"
            )


def _touched(decoder: Any) -> Iterator[nn.Module]:
    for layer in decoder.layers:
        yield from (layer, layer.input_layernorm, layer.post_attention_layernorm, layer.mlp, layer.self_attn)
    yield decoder.norm


def _origin(function: Any) -> str:
    return getattr(function, "__module__", None) or type(function).__module__


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
