"""Reads and checks single fields of a configuration, and refuses values that qwenkern does not support.

``fields`` are the fields of a config.json, and ``source`` is its name in messages. Every error is a ConfigError. This
file imports the standard library only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import arguments
from .errors import ConfigError, shown

# Larger sizes mean a damaged file: the largest size in the family is 152,064, and the most layers are 80.
LARGEST, MOST_LAYERS = 1 << 24, 1024


@dataclass(frozen=True)
class YarnScaling:
    """YaRN context extension (Peng et al. 2023, https://arxiv.org/abs/2309.00071).

    ``factor`` stretches ``original_max_position_embeddings``. Frequencies that turn more than ``beta_fast`` times in
    the original context are kept. Those that turn less than ``beta_slow`` times are interpolated. A ramp lies between.
    """

    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None  # multiplies cos and sin; None: 0.1 ln(factor) + 1, the paper's equation 22
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # the ramp's ends are rounded outwards to whole dimensions

    @property
    def attention_scale(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


def refuse_windows(fields: Mapping[str, Any], layers: int, context: int, source: str) -> None:
    """Raises ConfigError if transformers' Qwen2 would give a layer a window shorter than the context.

    Its rule: ``layer_types`` names the layers with a window; without it, these are the layers from
    ``max_window_layers`` on. Without ``use_sliding_window``, or if ``sliding_window`` is null, there is no window."""
    window = None
    if flag(fields, "use_sliding_window", False, source) and fields.get("sliding_window", 4096) is not None:
        window = whole(source, "sliding_window", fields.get("sliding_window", 4096))
    types = fields.get("layer_types")
    if types is None and window is not None:
        first = fields.get("max_window_layers", 28)
        if type(first) is not int or first < 0:
            raise ConfigError(f"{source}: max_window_layers is {shown(first)}; expected a whole number from 0 up")
        types = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    if types is None:
        return
    if not isinstance(types, list):
        raise ConfigError(f"{source}: layer_types is {shown(types)}; expected a list")
    if len(types) != layers:
        raise ConfigError(f"{source}: layer_types has {len(types)} entries for {layers} layers")
    for i, kind in enumerate(types):
        if kind not in ("full_attention", "sliding_attention"):
            raise ConfigError(f"{source}: layer_types[{i}] is {shown(kind)}; expected 'full_attention'")
        if kind == "sliding_attention" and (window is None or window < context):
            raise ConfigError(
                f"{source}: layer {i} has sliding-window attention (sliding_window {window}), which is not supported; "
                "expected 'full_attention', or use_sliding_window and a sliding_window of at least the context, "
                f"{context}"
            )


def rope(fields: Mapping[str, Any], max_positions: int, source: str) -> tuple[float, YarnScaling | None]:
    """Theta and scaling, from `rope_theta` and `rope_scaling` (transformers 4) or `rope_parameters` (transformers
    5)."""
    parameters = given_or(given_or(fields.get("rope_parameters") or None, fields.get("rope_scaling")), {})
    if not isinstance(parameters, Mapping):
        raise ConfigError(f"{source}: rope_parameters or rope_scaling is {shown(parameters)}; expected an object")
    outer, inner = fields.get("rope_theta"), parameters.get("rope_theta")
    if outer is not None and inner is not None and outer != inner:
        raise ConfigError(
            f"{source}: rope_theta is {shown(outer)} at the top and {shown(inner)} in rope_parameters; expected one "
            "value"
        )
    theta = given_or(given_or(inner, outer), 10000.0)  # transformers' default when a qwen2 config names none
    return theta, yarn(parameters, max_positions, source)


def yarn(rope: Mapping[str, Any], max_positions: int, source: str) -> YarnScaling | None:
    """The scaling of `rope_scaling` or `rope_parameters`; None if they have none."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise ConfigError(
            f"{source}: rope scaling of type {shown(kind)} is not supported; expected 'yarn' or 'default'"
        )
    if rope.get("mscale") or rope.get("mscale_all_dim"):
        raise ConfigError(f"{source}: rope scaling has mscale, which is not supported; expected attention_factor")
    given = given_or(rope.get("original_max_position_embeddings"), max_positions)
    original = whole(source, "original_max_position_embeddings", given)
    attention_factor = rope.get("attention_factor")
    scaling = YarnScaling(
        factor=positive(source, "rope scaling's factor", rope.get("factor")),
        original_max_position_embeddings=original,
        attention_factor=attention_factor
        if attention_factor is None
        else positive(source, "rope scaling's attention_factor", attention_factor),
        beta_fast=positive(source, "rope scaling's beta_fast", rope.get("beta_fast") or 32.0),
        beta_slow=positive(source, "rope scaling's beta_slow", rope.get("beta_slow") or 1.0),
        truncate=flag(rope, "truncate", True, source),
    )
    if scaling.factor < 1 or scaling.factor * original > LARGEST:
        raise ConfigError(f"{source}: rope scaling's factor is {scaling.factor}; expected 1 to {LARGEST // original}")
    return scaling


def head_dim_of(hidden: Any, heads: Any, source: str) -> int:
    """The size of a head if the configuration does not give it."""
    if not isinstance(hidden, int) or not isinstance(heads, int) or heads < 1 or hidden % heads:
        raise ConfigError(
            f"{source}: hidden_size {shown(hidden)} cannot be divided evenly among {shown(heads)} attention heads; "
            "expected a multiple, or head_dim to be given"
        )
    return hidden // heads


def required(fields: Mapping[str, Any], name: str, source: str) -> Any:
    if fields.get(name) is None:
        raise ConfigError(f"{source}: {name} is missing")
    return fields[name]


def whole(source: str, name: str, value: Any, largest: int = LARGEST) -> int:
    return arguments.whole(f"{source}: {name}", value, 1, largest, exact=True, error=ConfigError)


def positive(source: str, name: str, value: Any) -> float:
    """A number in the range of float32's normal numbers, because it is used in float32."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 2**-126 <= value < 2**128:
        raise ConfigError(f"{source}: {name} is {shown(value)}; expected a positive finite number in float32's range")
    return float(value)


def flag(fields: Mapping[str, Any], name: str, default: bool, source: str) -> bool:
    value = given_or(fields.get(name), default)
    if not isinstance(value, bool):
        raise ConfigError(f"{source}: {name} is {shown(value)}; expected true or false")
    return value


def given_or(value: Any, default: Any) -> Any:
    return default if value is None else value
