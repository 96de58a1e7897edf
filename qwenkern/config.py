"""The numbers that describe a Qwen2.5 model, read from config.json or GGUF metadata, and checked.

A leaf of the package: standard library only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ConfigError
from .reading import read_json

# Sizes above this are damage, not models: the largest of the family has 152,064 of anything.
_LARGEST = 1 << 24
_COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class YarnScaling:
    """YaRN context extension (Peng et al. 2023, https://arxiv.org/abs/2309.00071).

    ``factor`` stretches ``original_max_position_embeddings``. Frequencies that turn more than ``beta_fast`` times in
    the original context are kept, those that turn less than ``beta_slow`` times are interpolated, with a ramp between.
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


@dataclass(frozen=True)
class Config:
    """A dense Qwen2.5 model. Raises ConfigError when its numbers cannot describe one."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    rope_scaling: YarnScaling | None = None
    tie_word_embeddings: bool = False
    dtype: str = "bfloat16"  # of the weights in the checkpoint
    source: str = "config"  # the file or table that these numbers come from, for messages

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= _LARGEST:
                raise ConfigError(f"{self.source}: {name} is {value!r}; expected a whole number from 1 to {_LARGEST}")
        for name in ("rms_norm_eps", "rope_theta"):
            _positive(self.source, name, getattr(self, name))
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"{self.source}: {self.num_attention_heads} query heads cannot share {self.num_key_value_heads} "
                "key-value heads evenly; expected num_attention_heads to be a multiple of num_key_value_heads"
            )
        if self.head_dim % 2:
            raise ConfigError(f"{self.source}: head_dim is {self.head_dim}; rotary embedding needs an even number")

    @classmethod
    def from_json(cls, path: str | Path) -> Config:
        """Reads a Hugging Face config.json, in the spelling of transformers 4 or 5."""
        if not Path(path).exists():
            raise ConfigError(f"{path}: no such file; expected a model's config.json")
        fields = read_json(Path(path), ConfigError)
        return cls.from_dict(fields, source=str(path))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], source: str = "config") -> Config:
        """From the fields of a config.json. ``source`` names them in messages."""
        if fields.get("model_type") != "qwen2":
            raise ConfigError(
                f"{source}: model_type is {fields.get('model_type')!r}; qwenkern runs 'qwen2', the dense Qwen2.5 models"
            )
        if not isinstance(fields.get("layer_types") or [], list):
            raise ConfigError(f"{source}: layer_types is {fields['layer_types']!r}; expected a list")
        if fields.get("use_sliding_window") or "sliding_attention" in (fields.get("layer_types") or ()):
            raise ConfigError(f"{source}: use_sliding_window is true; sliding-window attention is not built yet")
        if fields.get("hidden_act", "silu") != "silu":
            raise ConfigError(f"{source}: hidden_act is {fields['hidden_act']!r}; expected 'silu'")
        layers = _required(fields, "num_hidden_layers", source)
        if fields.get("layer_types") is not None and len(fields["layer_types"]) != layers:
            raise ConfigError(f"{source}: layer_types has {len(fields['layer_types'])} entries for {layers} layers")
        heads = _required(fields, "num_attention_heads", source)
        max_positions = fields.get("max_position_embeddings", 32768)
        theta, scaling = _rope(fields, max_positions, source)
        hidden = _required(fields, "hidden_size", source)
        return cls(
            vocab_size=_required(fields, "vocab_size", source),
            hidden_size=hidden,
            intermediate_size=_required(fields, "intermediate_size", source),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=_or(fields.get("num_key_value_heads"), heads),
            head_dim=_or(fields.get("head_dim"), _head_dim(hidden, heads, source)),
            max_position_embeddings=max_positions,
            rms_norm_eps=fields.get("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=bool(fields.get("tie_word_embeddings", False)),
            dtype=str(_or(fields.get("torch_dtype"), _or(fields.get("dtype"), "bfloat16"))),
            source=source,
        )

    @classmethod
    def from_gguf(
        cls, metadata: Mapping[str, Any], *, vocab_size: int, tie_word_embeddings: bool, source: str = "GGUF"
    ) -> Config:
        """From the key-values of a GGUF file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). The width of
        the vocabulary and whether the output is tied are read off its tensors, not its metadata."""
        if metadata.get("general.architecture") != "qwen2":
            raise ConfigError(
                f"{source}: general.architecture is {metadata.get('general.architecture')!r}; qwenkern runs 'qwen2', "
                "the dense Qwen2.5 models"
            )
        fields = {key.removeprefix("qwen2."): value for key, value in metadata.items() if key.startswith("qwen2.")}
        hidden, heads = (_required(fields, name, source) for name in ("embedding_length", "attention.head_count"))
        context = _required(fields, "context_length", source)
        scaling = None
        if fields.get("rope.scaling.type", "none") != "none":
            rope = {
                "rope_type": fields["rope.scaling.type"],
                "factor": fields.get("rope.scaling.factor"),
                "original_max_position_embeddings": fields.get("rope.scaling.original_context_length"),
            }
            scaling = _yarn(rope, context, source)
        return cls(
            vocab_size=vocab_size,
            hidden_size=hidden,
            intermediate_size=_required(fields, "feed_forward_length", source),
            num_hidden_layers=_required(fields, "block_count", source),
            num_attention_heads=heads,
            num_key_value_heads=fields.get("attention.head_count_kv", heads),
            head_dim=fields.get("attention.key_length") or _head_dim(hidden, heads, source),
            max_position_embeddings=context,
            # GGUF keeps float32: 1e-6 comes as 9.99999997e-07, which this turns into the number that was meant
            rms_norm_eps=_shortest(fields.get("attention.layer_norm_rms_epsilon", 1e-6)),
            rope_theta=fields.get("rope.freq_base", 1e6),
            rope_scaling=scaling,
            tie_word_embeddings=tie_word_embeddings,
            source=source,
        )

    @classmethod
    def from_name(cls, name: str) -> Config:
        """A size of the family, such as "qwen2.5-3b" (case and the suffix -instruct do not matter)."""
        key = name.lower().split("/")[-1].removesuffix("-instruct").replace("-coder", "")
        if key not in FAMILY:
            raise ConfigError(f"{name!r} is not a size of the family; expected one of: {', '.join(FAMILY)}")
        return FAMILY[key]

    @property
    def context_length(self) -> int:
        """Tokens that a sequence may have, YaRN's extension included."""
        if self.rope_scaling is None:
            return self.max_position_embeddings
        stretched = self.rope_scaling.factor * self.rope_scaling.original_max_position_embeddings
        return max(self.max_position_embeddings, int(stretched))

    @property
    def q_size(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_key_value_heads * self.head_dim

    @property
    def qkv_size(self) -> int:
        return self.q_size + 2 * self.kv_size

    @property
    def num_embedding_parameters(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def num_layer_parameters(self) -> int:
        qkv = (self.hidden_size + 1) * self.qkv_size
        return qkv + self.hidden_size * (self.q_size + 3 * self.intermediate_size + 2)

    @property
    def num_parameters(self) -> int:
        """Exact count of trained numbers; tied embeddings count once."""
        embeddings = self.num_embedding_parameters * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_hidden_layers * self.num_layer_parameters + self.hidden_size

    def kv_bytes_per_token(self, bytes_per_element: int = 2) -> int:
        """Bytes that one token occupies in the key-value cache of all layers."""
        return 2 * self.num_hidden_layers * self.kv_size * bytes_per_element


def _rope(fields: Mapping[str, Any], max_positions: int, source: str) -> tuple[float, YarnScaling | None]:
    """Theta and scaling: `rope_theta` and `rope_scaling` (transformers 4), or `rope_parameters` (transformers 5)."""
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ConfigError(f"{source}: rope_parameters or rope_scaling is {rope!r}; expected an object")
    outer, inner = fields.get("rope_theta"), rope.get("rope_theta")
    if outer is not None and inner is not None and outer != inner:
        raise ConfigError(
            f"{source}: rope_theta is {outer} at the top and {inner} in rope_parameters; expected one value"
        )
    theta = _or(_or(inner, outer), 10000.0)  # transformers' default when a qwen2 config names none
    return theta, _yarn(rope, max_positions, source)


def _yarn(rope: Mapping[str, Any], max_positions: int, source: str) -> YarnScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise ConfigError(f"{source}: rope scaling of type {kind!r} is not built; expected 'yarn' or 'default'")
    if rope.get("mscale") or rope.get("mscale_all_dim"):
        raise ConfigError(f"{source}: rope scaling has mscale, which no Qwen2.5 model uses; expected attention_factor")
    original = _or(rope.get("original_max_position_embeddings"), max_positions)
    if not isinstance(original, int) or isinstance(original, bool) or not 0 < original <= _LARGEST:
        raise ConfigError(
            f"{source}: original_max_position_embeddings is {original!r}; expected a positive whole number"
        )
    attention_factor = rope.get("attention_factor")
    scaling = YarnScaling(
        factor=_positive(source, "rope scaling's factor", rope.get("factor")),
        original_max_position_embeddings=original,
        attention_factor=attention_factor
        if attention_factor is None
        else _positive(source, "rope scaling's attention_factor", attention_factor),
        beta_fast=_positive(source, "rope scaling's beta_fast", rope.get("beta_fast") or 32.0),
        beta_slow=_positive(source, "rope scaling's beta_slow", rope.get("beta_slow") or 1.0),
        truncate=bool(rope.get("truncate", True)),
    )
    if scaling.factor < 1 or scaling.factor * original > _LARGEST:
        raise ConfigError(f"{source}: rope scaling's factor is {scaling.factor}; expected 1 to {_LARGEST // original}")
    return scaling


def _head_dim(hidden: Any, heads: Any, source: str) -> int:
    if not isinstance(hidden, int) or not isinstance(heads, int) or heads < 1 or hidden % heads:
        raise ConfigError(
            f"{source}: hidden_size {hidden!r} cannot be divided evenly among {heads!r} attention heads; "
            "expected a multiple, or head_dim to be given"
        )
    return hidden // heads


def _required(fields: Mapping[str, Any], name: str, source: str) -> Any:
    if fields.get(name) is None:
        raise ConfigError(f"{source}: {name} is missing")
    return fields[name]


def _positive(source: str, name: str, value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ConfigError(f"{source}: {name} is {value!r}; expected a positive finite number")
    return float(value)


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _shortest(value: Any) -> Any:
    """The decimal number of seven digits whose float32 this is."""
    return float(f"{value:.7g}") if isinstance(value, float) else value


def _family(*sizes: tuple[str, int, int, int, int, int]) -> dict[str, Config]:
    return {
        name: Config(
            vocab_size=151936 if hidden <= 2048 else 152064,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=hidden // heads,
            tie_word_embeddings=hidden <= 2048,
            source=name,
        )
        for name, hidden, intermediate, layers, heads, kv_heads in sizes
    }


# The dense family: Qwen2.5 technical report (https://arxiv.org/abs/2412.15115), table 1, and the published config.json.
FAMILY = _family(
    ("qwen2.5-0.5b", 896, 4864, 24, 14, 2),
    ("qwen2.5-1.5b", 1536, 8960, 28, 12, 2),
    ("qwen2.5-3b", 2048, 11008, 36, 16, 2),
    ("qwen2.5-7b", 3584, 18944, 28, 28, 4),
    ("qwen2.5-14b", 5120, 13824, 48, 40, 8),
    ("qwen2.5-32b", 5120, 27648, 64, 40, 8),
    ("qwen2.5-72b", 8192, 29568, 80, 64, 8),
)
