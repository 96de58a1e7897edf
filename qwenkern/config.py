"""The numbers of a Qwen2.5 model, read from config.json or GGUF metadata, and checked.

This file imports the standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import config_fields as check
from .config_fields import YarnScaling
from .errors import ConfigError, shown
from .quantization_config import Quantization, quantization
from .reading import read_json

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
class Config:
    """The numbers of a dense Qwen2.5 model. Raises ConfigError if they cannot describe one.

    quantization: how a folder's weights are stored, if they are quantised."""

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
    dtype: str = "bfloat16"  # of the checkpoint's weights
    source: str = "config"  # the file or table that these numbers come from, for messages
    quantization: Quantization | None = None

    def __post_init__(self) -> None:
        for name in _COUNTS:
            check.whole(
                self.source,
                name,
                getattr(self, name),
                check.MOST_LAYERS if name == "num_hidden_layers" else check.LARGEST,
            )
        check.positive(self.source, "rms_norm_eps", self.rms_norm_eps)
        if check.positive(self.source, "rope_theta", self.rope_theta) <= 1:
            raise ConfigError(f"{self.source}: rope_theta is {self.rope_theta}; expected a number above 1")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"{self.source}: {self.num_attention_heads} query heads cannot share {self.num_key_value_heads} "
                "key-value heads evenly; expected num_attention_heads to be a multiple of num_key_value_heads"
            )
        if self.head_dim % 2:
            raise ConfigError(
                f"{self.source}: head_dim is {self.head_dim}; expected an even number, for rotary embedding"
            )

    @classmethod
    def from_json(cls, path: str | Path, dtype: str = "bfloat16") -> Config:
        """Reads a Hugging Face config.json, in the spelling of transformers 4 or 5. ``dtype`` as in `from_dict`."""
        if not Path(path).exists():
            raise ConfigError(f"{path}: no such file; expected a model's config.json")
        fields = read_json(Path(path), ConfigError)
        return cls.from_dict(fields, source=str(path), dtype=dtype)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], source: str = "config", dtype: str = "bfloat16") -> Config:
        """Reads the fields of a config.json. ``source``: their file, for messages. ``dtype``: of the weights, if the
        fields have none. Raises CheckpointError for quantised weights of a kind that qwenkern does not read."""
        if fields.get("model_type") != "qwen2":
            raise ConfigError(
                f"{source}: model_type is {shown(fields.get('model_type'))}; qwenkern runs 'qwen2', the dense Qwen2.5 "
                "models"
            )
        stored = quantization(fields, source)
        if fields.get("hidden_act", "silu") not in ("silu", "swish"):  # two names of one function
            raise ConfigError(f"{source}: hidden_act is {shown(fields['hidden_act'])}; expected 'silu'")
        layers = check.required(fields, "num_hidden_layers", source)
        heads = check.required(fields, "num_attention_heads", source)
        max_positions = fields.get("max_position_embeddings", 32768)
        theta, scaling = check.rope(fields, max_positions, source)
        hidden = check.required(fields, "hidden_size", source)
        head_dim = fields.get("head_dim")
        config = cls(
            vocab_size=check.required(fields, "vocab_size", source),
            hidden_size=hidden,
            intermediate_size=check.required(fields, "intermediate_size", source),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=check.given_or(fields.get("num_key_value_heads"), heads),
            head_dim=check.head_dim_of(hidden, heads, source) if head_dim is None else head_dim,
            max_position_embeddings=max_positions,
            rms_norm_eps=fields.get("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=check.flag(fields, "tie_word_embeddings", False, source),
            dtype=str(check.given_or(fields.get("dtype"), check.given_or(fields.get("torch_dtype"), dtype))),
            source=source,
            quantization=stored,
        )
        check.refuse_windows(fields, config.num_hidden_layers, config.context_length, source)
        return config

    @classmethod
    def from_gguf(
        cls, metadata: Mapping[str, Any], *, vocab_size: int, tie_word_embeddings: bool, source: str = "GGUF"
    ) -> Config:
        """Reads the key-values of a GGUF file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
        ``vocab_size`` and ``tie_word_embeddings`` follow from the file's tensors, not from its metadata."""
        if metadata.get("general.architecture") != "qwen2":
            raise ConfigError(
                f"{source}: general.architecture is {shown(metadata.get('general.architecture'))}; qwenkern runs "
                "'qwen2', the dense Qwen2.5 models"
            )
        fields = {key.removeprefix("qwen2."): value for key, value in metadata.items() if key.startswith("qwen2.")}
        hidden, heads = (check.required(fields, name, source) for name in ("embedding_length", "attention.head_count"))
        context = check.required(fields, "context_length", source)
        scaling = None
        if fields.get("rope.scaling.type", "none") != "none":
            scaled = {
                "rope_type": fields["rope.scaling.type"],
                "factor": fields.get("rope.scaling.factor"),
                "original_max_position_embeddings": fields.get("rope.scaling.original_context_length"),
            }
            scaling = check.yarn(scaled, context, source)
        head_dim = fields.get("attention.key_length")
        head_dim = (
            check.head_dim_of(hidden, heads, source) if head_dim is None else check.whole(source, "head_dim", head_dim)
        )
        for name in ("rope.dimension_count", "attention.value_length"):
            if (found := fields.get(name, head_dim)) != head_dim:
                raise ConfigError(f"{source}: {name} is {shown(found)}; expected the heads' {shown(head_dim)}")
        return cls(
            vocab_size=vocab_size,
            hidden_size=hidden,
            intermediate_size=check.required(fields, "feed_forward_length", source),
            num_hidden_layers=check.required(fields, "block_count", source),
            num_attention_heads=heads,
            num_key_value_heads=fields.get("attention.head_count_kv", heads),
            head_dim=head_dim,
            max_position_embeddings=context,
            # GGUF stores float32, so 1e-6 comes as 9.99999997e-07; this gives 1e-6 again
            rms_norm_eps=_shortest(fields.get("attention.layer_norm_rms_epsilon", 1e-6)),
            rope_theta=fields.get("rope.freq_base", 1e6),
            rope_scaling=scaling,
            tie_word_embeddings=tie_word_embeddings,
            source=source,
        )

    @classmethod
    def from_name(cls, name: str) -> Config:
        """The numbers of a size of the family, such as "qwen2.5-3b". Case and the suffix -instruct do not matter."""
        key = name.lower().split("/")[-1].removesuffix("-instruct").replace("-coder", "")
        if key not in FAMILY:
            raise ConfigError(f"{shown(name)} is not a size of the family; expected one of: {', '.join(FAMILY)}")
        return FAMILY[key]

    @property
    def context_length(self) -> int:
        """The most tokens of a sequence, with YaRN's extension."""
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
        """The exact number of parameters; tied embeddings count once."""
        embeddings = self.num_embedding_parameters * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_hidden_layers * self.num_layer_parameters + self.hidden_size

    def kv_bytes_per_token(self, bytes_per_element: int = 2) -> int:
        """Bytes of one token in the key-value cache, for all layers."""
        return 2 * self.num_hidden_layers * self.kv_size * bytes_per_element


def _shortest(value: Any) -> Any:
    """The decimal number with at most seven digits that has this float32 value."""
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
