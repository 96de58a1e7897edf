"""The numbers that describe a Qwen2.5 model, read from config.json or GGUF metadata, and checked.

A leaf of the package: standard library only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ConfigError, shown
from .reading import read_json

# Sizes above these are damage, not models: the largest of the family has 152,064 of anything, and 80 layers.
_LARGEST, _MOST_LAYERS = 1 << 24, 1024
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
            _whole(self.source, name, getattr(self, name), _MOST_LAYERS if name == "num_hidden_layers" else _LARGEST)
        _positive(self.source, "rms_norm_eps", self.rms_norm_eps)
        if _positive(self.source, "rope_theta", self.rope_theta) <= 1:
            raise ConfigError(f"{self.source}: rope_theta is {self.rope_theta}; expected a number above 1")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"{self.source}: {self.num_attention_heads} query heads cannot share {self.num_key_value_heads} "
                "key-value heads evenly; expected num_attention_heads to be a multiple of num_key_value_heads"
            )
        if self.head_dim % 2:
            raise ConfigError(f"{self.source}: head_dim is {self.head_dim}; rotary embedding needs an even number")

    @classmethod
    def from_json(cls, path: str | Path, dtype: str = "bfloat16") -> Config:
        """Reads a Hugging Face config.json, in the spelling of transformers 4 or 5. ``dtype`` as in `from_dict`."""
        if not Path(path).exists():
            raise ConfigError(f"{path}: no such file; expected a model's config.json")
        fields = read_json(Path(path), ConfigError)
        return cls.from_dict(fields, source=str(path), dtype=dtype)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], source: str = "config", dtype: str = "bfloat16") -> Config:
        """From the fields of a config.json. ``source`` names them in messages; ``dtype`` is that of the weights where
        the fields name none."""
        if fields.get("model_type") != "qwen2":
            raise ConfigError(
                f"{source}: model_type is {shown(fields.get('model_type'))}; qwenkern runs 'qwen2', the dense Qwen2.5 "
                "models"
            )
        _refuse_quantised(fields, source)
        if fields.get("hidden_act", "silu") != "silu":
            raise ConfigError(f"{source}: hidden_act is {shown(fields['hidden_act'])}; expected 'silu'")
        layers = _required(fields, "num_hidden_layers", source)
        heads = _required(fields, "num_attention_heads", source)
        max_positions = fields.get("max_position_embeddings", 32768)
        theta, scaling = _rope(fields, max_positions, source)
        hidden = _required(fields, "hidden_size", source)
        head_dim = fields.get("head_dim")
        config = cls(
            vocab_size=_required(fields, "vocab_size", source),
            hidden_size=hidden,
            intermediate_size=_required(fields, "intermediate_size", source),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=_or(fields.get("num_key_value_heads"), heads),
            head_dim=_head_dim(hidden, heads, source) if head_dim is None else head_dim,
            max_position_embeddings=max_positions,
            rms_norm_eps=fields.get("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=_flag(fields, "tie_word_embeddings", False, source),
            dtype=str(_or(fields.get("dtype"), _or(fields.get("torch_dtype"), dtype))),
            source=source,
        )
        _refuse_windows(fields, config)
        return config

    @classmethod
    def from_gguf(
        cls, metadata: Mapping[str, Any], *, vocab_size: int, tie_word_embeddings: bool, source: str = "GGUF"
    ) -> Config:
        """From the key-values of a GGUF file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). The width of
        the vocabulary and whether the output is tied are read off its tensors, not its metadata."""
        if metadata.get("general.architecture") != "qwen2":
            raise ConfigError(
                f"{source}: general.architecture is {shown(metadata.get('general.architecture'))}; qwenkern runs "
                "'qwen2', the dense Qwen2.5 models"
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
        head_dim = fields.get("attention.key_length")
        head_dim = _head_dim(hidden, heads, source) if head_dim is None else _whole(source, "head_dim", head_dim)
        for name in ("rope.dimension_count", "attention.value_length"):
            if (found := fields.get(name, head_dim)) != head_dim:
                raise ConfigError(f"{source}: {name} is {shown(found)}; expected the heads' {shown(head_dim)}")
        return cls(
            vocab_size=vocab_size,
            hidden_size=hidden,
            intermediate_size=_required(fields, "feed_forward_length", source),
            num_hidden_layers=_required(fields, "block_count", source),
            num_attention_heads=heads,
            num_key_value_heads=fields.get("attention.head_count_kv", heads),
            head_dim=head_dim,
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


def _refuse_quantised(fields: Mapping[str, Any], source: str) -> None:
    """Raises ConfigError for weights that are not numbers of bfloat16, float16 or float32."""
    for name in ("quantization_config", "compression_config"):  # the second: compressed-tensors, in earlier files
        found = fields.get(name)
        if found in (None, {}):
            continue
        if not isinstance(found, Mapping):
            raise ConfigError(f"{source}: {name} is {shown(found)}; expected an object")
        loads_bits = found.get("load_in_4bit") or found.get("load_in_8bit")
        method = found.get("quant_method") or ("bitsandbytes" if loads_bits else None)
        raise ConfigError(
            f"{source}: {name} says that the weights are quantised by {shown(method)}, which is not built; expected "
            "bfloat16, float16 or float32: take the model that this one was made from, or a GGUF file of it"
        )


def _refuse_windows(fields: Mapping[str, Any], config: Config) -> None:
    """Raises ConfigError where transformers' Qwen2 would give a layer a window shorter than the context.

    Its rule: ``layer_types`` says which layers have the window, else those from ``max_window_layers`` on; without
    ``use_sliding_window``, or with ``sliding_window`` null, there is no window."""
    source, layers = config.source, config.num_hidden_layers
    window = None
    if _flag(fields, "use_sliding_window", False, source) and fields.get("sliding_window", 4096) is not None:
        window = _whole(source, "sliding_window", fields.get("sliding_window", 4096))
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
        if kind == "sliding_attention" and (window is None or window < config.context_length):
            raise ConfigError(
                f"{source}: layer {i} has sliding-window attention (sliding_window {window}), which is not built; "
                "expected 'full_attention', or use_sliding_window and a sliding_window of at least the context, "
                f"{config.context_length}"
            )


def _rope(fields: Mapping[str, Any], max_positions: int, source: str) -> tuple[float, YarnScaling | None]:
    """Theta and scaling: `rope_theta` and `rope_scaling` (transformers 4), or `rope_parameters` (transformers 5)."""
    rope = _or(_or(fields.get("rope_parameters") or None, fields.get("rope_scaling")), {})
    if not isinstance(rope, Mapping):
        raise ConfigError(f"{source}: rope_parameters or rope_scaling is {shown(rope)}; expected an object")
    outer, inner = fields.get("rope_theta"), rope.get("rope_theta")
    if outer is not None and inner is not None and outer != inner:
        raise ConfigError(
            f"{source}: rope_theta is {shown(outer)} at the top and {shown(inner)} in rope_parameters; expected one "
            "value"
        )
    theta = _or(_or(inner, outer), 10000.0)  # transformers' default when a qwen2 config names none
    return theta, _yarn(rope, max_positions, source)


def _yarn(rope: Mapping[str, Any], max_positions: int, source: str) -> YarnScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise ConfigError(f"{source}: rope scaling of type {shown(kind)} is not built; expected 'yarn' or 'default'")
    if rope.get("mscale") or rope.get("mscale_all_dim"):
        raise ConfigError(f"{source}: rope scaling has mscale, which no Qwen2.5 model uses; expected attention_factor")
    given = _or(rope.get("original_max_position_embeddings"), max_positions)
    original = _whole(source, "original_max_position_embeddings", given)
    attention_factor = rope.get("attention_factor")
    scaling = YarnScaling(
        factor=_positive(source, "rope scaling's factor", rope.get("factor")),
        original_max_position_embeddings=original,
        attention_factor=attention_factor
        if attention_factor is None
        else _positive(source, "rope scaling's attention_factor", attention_factor),
        beta_fast=_positive(source, "rope scaling's beta_fast", rope.get("beta_fast") or 32.0),
        beta_slow=_positive(source, "rope scaling's beta_slow", rope.get("beta_slow") or 1.0),
        truncate=_flag(rope, "truncate", True, source),
    )
    if scaling.factor < 1 or scaling.factor * original > _LARGEST:
        raise ConfigError(f"{source}: rope scaling's factor is {scaling.factor}; expected 1 to {_LARGEST // original}")
    return scaling


def _head_dim(hidden: Any, heads: Any, source: str) -> int:
    if not isinstance(hidden, int) or not isinstance(heads, int) or heads < 1 or hidden % heads:
        raise ConfigError(
            f"{source}: hidden_size {shown(hidden)} cannot be divided evenly among {shown(heads)} attention heads; "
            "expected a multiple, or head_dim to be given"
        )
    return hidden // heads


def _required(fields: Mapping[str, Any], name: str, source: str) -> Any:
    if fields.get(name) is None:
        raise ConfigError(f"{source}: {name} is missing")
    return fields[name]


def _whole(source: str, name: str, value: Any, largest: int = _LARGEST) -> int:
    if type(value) is not int or not 0 < value <= largest:
        raise ConfigError(f"{source}: {name} is {shown(value)}; expected a whole number from 1 to {largest}")
    return value


def _positive(source: str, name: str, value: Any) -> float:
    """In the range of a float32's normal numbers, which is what these are computed with."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 2**-126 <= value < 2**128:
        raise ConfigError(f"{source}: {name} is {shown(value)}; expected a positive finite number, as float32 has them")
    return float(value)


def _flag(fields: Mapping[str, Any], name: str, default: bool, source: str) -> bool:
    value = _or(fields.get(name), default)
    if not isinstance(value, bool):
        raise ConfigError(f"{source}: {name} is {shown(value)}; expected true or false")
    return value


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
