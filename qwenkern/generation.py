"""What a checkpoint says about generation: which ids end a text, how tokens are sampled, how long a text may be.

The rules are the same for a folder of safetensors and for a GGUF file (docs/generation.md has them for users):

- A text ends at the ids of all these sources: `eos_token_id` of generation_config.json and of config.json, `eos_token`
  of tokenizer_config.json, the GGUF keys in _END_KEYS, and the added tokens of the vocabulary whose spelling is in
  END_TOKENS. A chat also ends at the token with which its template ends a turn.
- Sampling and the number of tokens come from generation_config.json, or from config.json if that file is missing, as in
  transformers. In a GGUF file, sampling comes from `general.sampling.*`.

A field that is null counts as absent. An impossible value raises ConfigError. One warning names the fields that
qwenkern does not support."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .errors import ConfigError, RequestError, shown
from .reading import read_json
from .sampling import SamplingParams

logger = logging.getLogger(__name__)

# Spellings of added tokens that end a text: those of llama.cpp's end-of-generation tokens (src/llama-vocab.cpp of
# https://github.com/ggml-org/llama.cpp) that Qwen2 models and models tuned from them have. llama.cpp looks for them
# among all tokens, where </s> is a piece of text in Qwen's vocabulary.
END_TOKENS = (
    "<|im_end|>",
    "<|endoftext|>",
    "<|fim_pad|>",  # with the next two: after a fill-in-the-middle, Coder continues with another file or repository
    "<|repo_name|>",
    "<|file_sep|>",
    "<｜end▁of▁sentence｜>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "</s>",
    "<eos>",
    "<EOT>",
)
_END_KEYS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep"))
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_SAMPLING_KEYS = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}
# Fields of transformers' GenerationConfig and of GGUF that change a text and are not supported: their neutral values.
_NOT_BUILT = {
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "constraints": None,
    "diversity_penalty": 0.0,
    "dola_layers": None,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "exponential_decay_length_penalty": None,
    "force_words_ids": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": 1.0,
    "max_time": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "penalty_alpha": 0.0,
    "remove_invalid_values": False,
    "sequence_bias": None,
    "stop_strings": None,
    "suppress_tokens": None,
    "token_healing": False,
    "top_h": None,
    "typical_p": 1.0,
    "watermarking_config": None,
    "general.sampling.mirostat": 0,
    "general.sampling.sequence": None,
    "general.sampling.xtc_probability": 0.0,
}


@dataclass(frozen=True)
class Generation:
    """What a checkpoint says about generation; a field is empty if the checkpoint does not say it.

    end_ids         ids that end a text, except those that only the tokenizer names
    sampling        values for the fields of SamplingParams that a caller leaves None
    max_new_tokens  the most tokens after a prompt if a caller gives no max_tokens; None: no limit
    max_length      the same for the prompt and the new tokens together; max_new_tokens overrides it
    source          the name of the file that they come from, without its folder: a server tells it to clients
    """

    end_ids: frozenset[int] = frozenset()
    sampling: Mapping[str, float] = field(default_factory=dict)
    max_new_tokens: int | None = None
    max_length: int | None = None
    source: str = "the checkpoint"

    @classmethod
    def from_folder(cls, folder: Path, vocab_size: int) -> Generation:
        """Reads generation_config.json and config.json. vocab_size: the number of logits.

        Raises ConfigError for an impossible value, and CheckpointError for a file that cannot be read."""
        own, general = folder / "generation_config.json", folder / "config.json"
        config = read_json(general)
        said, source = (read_json(own), own) if os.path.lexists(own) else (config, general)
        return cls.from_fields(said, vocab_size, str(source)).with_ends(config, vocab_size, str(general))

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any], vocab_size: int, source: str) -> Generation:
        """Reads the fields of a generation_config.json. ``source``: its name, for messages.

        If `do_sample` is false or absent, sampling is greedy, whatever the temperature."""
        fields = {name: value for name, value in fields.items() if value is not None}
        sampling = {name: fields[name] for name in _SAMPLING if name in fields}
        for name in ("max_new_tokens", "max_length"):
            _check(source, name, fields.get(name), max_tokens=fields.get(name))
        for name, value in sampling.items():
            _check(source, name, value, **{name: value})
        if not isinstance(samples := fields.get("do_sample", False), bool):
            raise ConfigError(f"{source}: do_sample is {shown(samples)}; expected true or false")
        sampling["temperature"] = sampling.get("temperature", 1.0) if samples else 0.0
        _warn_of_others(fields, source)
        generation = cls(
            sampling=sampling,
            max_new_tokens=fields.get("max_new_tokens"),
            max_length=fields.get("max_length"),
            source=Path(source).name or source,
        )
        return generation.with_ends(fields, vocab_size, source)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], vocab_size: int, source: str) -> Generation:
        """Reads the key-values of a GGUF file. Raises ConfigError, which names the key."""
        ends = {key: metadata[key] for key in _END_KEYS if key in metadata}
        for key, value in ends.items():
            if not _is_id(value, vocab_size):
                raise ConfigError(f"{source}: {key} is {shown(value)}; expected a token id below {vocab_size}")
        sampling = {}
        for key, name in _SAMPLING_KEYS.items():
            if (value := metadata.get(key)) is not None:
                sampling[name] = (
                    0 if name == "top_k" and value == -1 else value
                )  # llama.cpp also takes -1 for all tokens
                _check(source, key, value, **{name: sampling[name]})
        if sampling:
            sampling.setdefault("temperature", 1.0)
        _warn_of_others(metadata, source)
        return cls(end_ids=frozenset(ends.values()), sampling=sampling, source=Path(source).name or source)

    def with_ends(self, fields: Mapping[str, Any], vocab_size: int, source: str) -> Generation:
        """The same with the ids of `eos_token_id` in ``fields``: an id, or a list of ids."""
        listed = fields.get("eos_token_id")
        if listed is None:
            return self
        ids = listed if isinstance(listed, list) else [listed]
        if not all(_is_id(token, vocab_size) for token in ids):
            raise ConfigError(
                f"{source}: eos_token_id is {shown(listed)}; expected a token id below {vocab_size}, or a list of them"
            )
        return replace(self, end_ids=self.end_ids | frozenset(ids))

    def max_tokens_after(self, num_prompt_tokens: int) -> int | None:
        """The number of tokens that may follow a prompt; None: as many as there is room for. Raises RequestError if
        max_length allows none, as transformers does."""
        if self.max_new_tokens is not None or self.max_length is None:
            return self.max_new_tokens
        if num_prompt_tokens >= self.max_length:
            raise RequestError(
                f"the prompt has {num_prompt_tokens} tokens, and max_length of {self.source} is {self.max_length}; "
                "expected a shorter prompt, or max_tokens, which overrides it"
            )
        return self.max_length - num_prompt_tokens


def check_eos_token(token: Any, vocab: Mapping[str, int], width: Any, file: Path) -> None:
    """Raises ConfigError if the `eos_token` of a tokenizer_config.json is not a token, or is one without a logit."""
    text = token.get("content") if isinstance(token, dict) else token
    if token is not None and not isinstance(text, str):
        raise ConfigError(f"{file}: eos_token is {shown(token)}; expected a text, or an object with its content")
    token_id = vocab.get(text) if isinstance(text, str) else None
    if token_id is not None and isinstance(width, int) and token_id >= width:
        raise ConfigError(
            f"{file}: eos_token is {shown(text)}, with id {token_id}; expected one below vocab_size {width}"
        )
    if token is not None and token_id is None:
        logger.warning(
            "%s: eos_token is %s, which the vocabulary does not have; it will not end a text", file, shown(text)
        )


def _check(source: str, name: str, value: Any, **as_params: Any) -> None:
    """Raises ConfigError if a file's value is one that a caller may not pass."""
    try:
        SamplingParams(**as_params)
    except RequestError as error:
        expected = str(error).split("; expected ")[-1]
        raise ConfigError(f"{source}: {name} is {shown(value)}; expected {expected}") from error


def _is_id(value: Any, vocab_size: int) -> bool:
    return type(value) is int and 0 <= value < vocab_size


def _warn_of_others(fields: Mapping[str, Any], source: str) -> None:
    ignored = [name for name, neutral in _NOT_BUILT.items() if fields.get(name, neutral) not in (neutral, None, [], {})]
    if ignored:
        logger.warning("%s: qwenkern does not support %s, and ignores it", source, ", ".join(ignored))
