"""Converts a caller's prompts to checked requests: token ids, and the most tokens of the text."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeGuard

import torch
from torch import Tensor

from .arguments import is_whole
from .config import Config
from .engine import Request
from .errors import RequestError, shown
from .generation import Generation
from .sampling import Grammars, Overrun, SamplingParams, grammar_of
from .text.detokenizer import Detokenizer
from .text.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]  # text, token ids, or the messages of a chat

_NO_IDS = (torch.bool, torch.complex32, torch.complex64, torch.complex128)


@dataclass(frozen=True)
class Prompts:
    """Reads the prompts of one model. A wrong prompt raises RequestError."""

    config: Config
    tokenizer: Tokenizer | None
    generation: Generation  # the checkpoint's end tokens, limits and sampling
    cache_tokens: int  # tokens that fit the key-value cache
    grammars: Grammars

    def requests(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        shorten: bool = False,
    ) -> list[Request]:
        """Checked requests, n for each prompt in order. The first of each n has the others as its siblings.

        shorten: whether max_tokens is reduced to the tokens that the context still has room for, and not refused."""
        params = params.with_defaults(self.generation.sampling)
        self._check_params(params)
        requests = []
        grammar, overrun = grammar_of(params), Overrun()
        for prompt_index, prompt in enumerate(prompts):
            ids = self.encode(prompt, tools, continue_final_message)
            self.check(ids)
            end_ids = self._end_ids(params, is_chat=not isinstance(prompt, str) and not is_ids(prompt))
            max_tokens = self._max_tokens(len(ids), params, shorten)
            group = [
                Request(
                    prompt_ids=ids,
                    params=params,
                    end_ids=end_ids,
                    max_tokens=max_tokens,
                    detokenizer=self._detokenizer(params),
                    matcher=self.grammars.matcher(grammar, end_ids, overrun) if grammar else None,
                    prompt_index=prompt_index,
                    sample_index=sample_index,
                )
                for sample_index in range(params.n)
            ]
            group[0].siblings = group[1:]
            requests += group
        if not requests:
            raise RequestError("prompts is an empty list; expected at least one prompt")
        return requests

    def _detokenizer(self, params: SamplingParams) -> Detokenizer | None:
        return Detokenizer(self.tokenizer, skip_special=params.skip_special_tokens) if self.tokenizer else None

    def encode(
        self,
        prompt: Prompt,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
    ) -> list[int]:
        """Token ids of one prompt. continue_final_message: whether the completion continues a chat's last message."""
        if not isinstance(tools, list | tuple | None):
            raise RequestError(f"tools: found {shown(tools)}; expected a list of dicts, one function schema each")
        if is_ids(prompt):
            if tools:
                raise RequestError("tools need chat messages as the prompt, found token ids")
            if isinstance(prompt, range):
                prompt = prompt[
                    : self.config.context_length + 1
                ]  # a longer prompt would be refused, but only after a long time
            return [operator.index(token) for token in prompt]
        if not isinstance(prompt, (str, list, tuple)):
            raise RequestError(
                f"prompt is of type {type(prompt).__name__}; expected a text, a list of token ids or of chat messages"
            )
        if self.tokenizer is None:
            raise RequestError("this model has no tokenizer; expected prompts as lists of token ids")
        if isinstance(prompt, str):
            if tools:
                raise RequestError("tools need chat messages as the prompt, found a text")
            return self.tokenizer.encode_prompt(prompt)
        return self.tokenizer.encode_chat(prompt, tools=tools, continue_final_message=continue_final_message)

    def check(self, ids: list[int]) -> None:
        """Raises RequestError if there are no ids, unknown ids, or more ids than there is room for."""
        if not ids:
            raise RequestError("the prompt is empty; expected at least one token")
        low, high = min(ids), max(ids)
        if low < 0 or high >= self.config.vocab_size:
            raise RequestError(
                f"the prompt has token id {shown(low if low < 0 else high)}; expected 0 to {self.config.vocab_size - 1}"
            )

        self._room_after(len(ids))

    def _room_after(self, num_tokens: int) -> tuple[int, str]:
        """The number of tokens that may follow ``num_tokens``, and the limit as text. RequestError if there is no
        room."""
        cached = self.cache_tokens
        room, where = min((self.config.context_length, "context length"), (cached, "key-value cache (cache_tokens)"))
        if num_tokens > room:
            raise RequestError(f"the prompt has {num_tokens} tokens, and the {where} is {room}")
        # the last sampled token need not be cached, so a full context still gives one token
        return max(1, room - num_tokens), f"the {where} is {room}"

    def _max_tokens(self, num_prompt_tokens: int, params: SamplingParams, shorten: bool) -> int:
        """The number of tokens that may follow the prompt. RequestError if more are requested than there is room
        for, unless ``shorten``."""
        room, limit = self._room_after(num_prompt_tokens)
        if params.max_tokens is None:
            wanted = self.generation.max_tokens_after(num_prompt_tokens)
            if wanted is not None and wanted < params.min_tokens:
                raise RequestError(
                    f"min_tokens is {params.min_tokens}, and {self.generation.source} allows {wanted} tokens after "
                    f"{num_prompt_tokens} of a prompt; expected max_tokens, which overrides that"
                )
            return room if wanted is None else min(wanted, room)
        if params.max_tokens > room and not shorten:
            raise RequestError(
                f"the prompt's {num_prompt_tokens} tokens and max_tokens {params.max_tokens} make "
                f"{num_prompt_tokens + params.max_tokens}, and {limit}"
            )
        return min(params.max_tokens, room)

    def _check_params(self, params: SamplingParams) -> None:
        width = self.config.vocab_size
        for name, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
            if beyond := [token for token in ids if token >= width]:
                raise RequestError(f"{name} has token id {beyond[0]}; expected 0 to {width - 1}")
        if params.stop and self.tokenizer is None:
            raise RequestError("stop strings need a tokenizer, and this model has none; expected stop_token_ids")

    def _end_ids(self, params: SamplingParams, is_chat: bool) -> frozenset[int]:
        """The ids that end a text; see generation.py."""
        ends = set() if params.ignore_eos else set(self.generation.end_ids)
        if self.tokenizer and not params.ignore_eos:
            ends |= self.tokenizer.end_of_text_ids
            if is_chat:
                ends |= self.tokenizer.end_of_turn_ids
        width = (
            self.config.vocab_size
        )  # a tokenizer may have more ids than the model has logits; such ids are never drawn
        return frozenset(params.stop_token_ids) | {token for token in ends if token < width}


def sampling_params(params: SamplingParams | None, keywords: dict[str, Any]) -> SamplingParams:
    """SamplingParams with the given keywords. Raises RequestError."""
    if params is not None and not isinstance(params, SamplingParams):
        raise RequestError(f"params is of type {type(params).__name__}; expected SamplingParams")
    known = {field.name for field in fields(SamplingParams)}
    if unknown := sorted(keywords.keys() - known):
        raise RequestError(
            f"{shown(unknown[0])} is not a sampling parameter; expected one of: {', '.join(sorted(known))}"
        )
    return replace(params or SamplingParams(), **keywords)


def is_ids(prompt: Any) -> TypeGuard[Sequence[int]]:
    """Whether these are token ids."""
    return isinstance(prompt, range) or (isinstance(prompt, (list, tuple)) and all(map(is_whole, prompt)))


def is_one_prompt(prompts: Any) -> bool:
    """Whether this is one prompt, not a list of them. An empty list is a prompt without tokens."""
    if not isinstance(prompts, (list, tuple, range)):
        return True
    return is_ids(prompts) or all(isinstance(message, Mapping) for message in prompts)


def rows_of_ids(ids: Tensor | Sequence[int] | Sequence[Sequence[int]]) -> tuple[list[list[int]], bool]:
    """The rows of ids [T] or [B, T], and whether there is a batch of them. Raises RequestError."""
    try:
        ids = ids if isinstance(ids, Tensor) else torch.as_tensor(ids, device="cpu")
        rows = ids.tolist() if ids.dim() == 2 else [ids.tolist()]
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:  # ragged, too large, on no device
        raise RequestError(f"ids are {shown(ids)}; expected [T] or [B, T] integers: {error}") from error
    if ids.dtype in _NO_IDS or ids.dtype.is_floating_point or ids.dim() not in (1, 2):
        raise RequestError(f"ids have shape {list(ids.shape)} and dtype {ids.dtype}; expected [T] or [B, T] integers")
    if not rows:
        raise RequestError(f"ids have shape {list(ids.shape)}; expected at least one row")
    return rows, ids.dim() == 2
