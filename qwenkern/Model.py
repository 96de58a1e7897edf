"""The facade: load a model, and turn prompts into text, log-probabilities or logits."""

from __future__ import annotations

import logging
import math
import operator
import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .arguments import flag, is_whole, whole
from .cache import PagedCache
from .checkpoint import load_weights, open_checkpoint
from .config import Config
from .engine import generate as engine
from .engine.completion import Completion, Score, Stream
from .engine.decode import DecodeSteps
from .errors import ConfigError, NonFiniteError, RequestError, shown
from .generation import Generation
from .hub import sources
from .kernels import c as c_backend
from .kernels import invariant_tokens
from .qwen2 import Qwen2, initialise
from .sampling import SamplingParams
from .text.tokenizer import Detokenizer, Tokenizer

logger = logging.getLogger(__name__)

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]  # text, token ids, or the messages of a chat

_NO_IDS = (torch.bool, torch.complex32, torch.complex64, torch.complex128)
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Model:
    """A Qwen2.5 model on one device.

    >>> model = Model.from_pretrained("Qwen/Qwen2.5-3B-Instruct")
    >>> model.chat([{"role": "user", "content": "Hello!"}]).text

    Safe to use from several threads: forward passes take turns, and who finds the key-value cache full waits."""

    def __init__(
        self,
        module: Qwen2,
        tokenizer: Tokenizer | None,
        generation: Generation | None = None,
        cache_tokens: int | None = None,
        prefill_chunk: int | None = None,
        deterministic: bool = False,
    ) -> None:
        self.module = module
        self.config = module.config
        self.tokenizer = tokenizer
        self.generation = generation or Generation()  # what the checkpoint says of it
        self.dtype = module.model.norm.weight.dtype
        self.device = module.model.norm.weight.device
        chunk = whole("prefill_chunk", prefill_chunk, 1, optional=True)
        self.prefill_chunk = chunk or (512 if self.device.type == "cpu" else 4096)
        self.cache = PagedCache(self.config, self._cache_tokens(cache_tokens), self.dtype, self.device)
        self.deterministic = flag("deterministic", deterministic)
        self._steps: DecodeSteps | None = None

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        cache_tokens: int | None = None,
        prefill_chunk: int | None = None,
        deterministic: bool = False,
        threads: int | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> Model:
        """Loads a checkpoint.

        model: a hub id ("Qwen/Qwen2.5-3B-Instruct"), a short name ("qwen2.5-3b-instruct", "demo"), a folder of
            safetensors, or a .gguf file, whose weights are dequantised.
        device: "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1".
        dtype: "auto" (that of config.json, else of the first weight; bfloat16 for GGUF), "bfloat16", "float16",
            "float32".
        cache_tokens: room of the key-value cache, shared by all calls: a sequence that finds it full waits.
        prefill_chunk: prompt tokens a pass.
        deterministic: the same bits for a prompt in whatever batch it comes. Without it that holds for the decode steps
            of up to 16 sequences on our kernels. It costs throughput, not latency: prompts are read one by one, at most
            16 sequences decode together (one where torch computes, as in float32 on a CPU), and each takes all the
            room in the cache that its max_tokens may need before it starts.
        threads: how many this process computes with on a CPU, torch's included. None: what QWENKERN_THREADS says, else
            one for each physical core that it may run on and that its cgroup's quota and torch allow.
        progress: called with what is done ("download", "load"), bytes so far, bytes in all.

        Raises CheckpointError, ConfigError or RequestError, naming what was found and what was expected."""
        _use_threads(threads)
        if progress is not None and not callable(progress):
            raise RequestError(f"progress is {shown(progress)}; expected a function or None")
        device = _device(device)
        path = sources.resolve(model, progress=progress and (lambda done, total: progress("download", done, total)))
        started = time.perf_counter()
        checkpoint = open_checkpoint(path)
        dtype = _dtype(dtype, checkpoint.config, device)
        tokenizer = (
            Tokenizer.from_gguf(checkpoint.metadata, source=str(path))
            if checkpoint.metadata
            else Tokenizer.from_folder(path)
        )
        module = Qwen2(checkpoint.config, dtype, device)
        load_weights(
            module,
            checkpoint.config,
            checkpoint.tensors(dtype),
            source=str(path),
            progress=progress and (lambda done: progress("load", done, checkpoint.num_bytes(dtype))),
        )
        logger.info("loaded %s as %s on %s in %.1f s", path, dtype, device, time.perf_counter() - started)
        return cls(module, tokenizer, checkpoint.generation, cache_tokens, prefill_chunk, deterministic)

    @classmethod
    def from_config(
        cls,
        config: Config | str,
        *,
        seed: int = 0,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        tokenizer: Tokenizer | None = None,
        cache_tokens: int | None = None,
        prefill_chunk: int | None = None,
        deterministic: bool = False,
        threads: int | None = None,
    ) -> Model:
        """A model of random weights, made in place: a Config, or a size of the family such as "qwen2.5-3b".

        Without a tokenizer, prompts are token ids and completions have no text."""
        _use_threads(threads)
        config = Config.from_name(config) if isinstance(config, str) else config
        if not isinstance(config, Config):
            raise RequestError(f"config is of type {type(config).__name__}; expected a Config or a name")
        if not isinstance(tokenizer, Tokenizer | None):
            raise RequestError(f"tokenizer is of type {type(tokenizer).__name__}; expected a Tokenizer or None")
        seed = whole("seed", seed, -(2**63), 2**64 - 1)
        device = _device(device)
        module = Qwen2(config, _dtype(dtype, config, device), device)
        initialise(module, seed)
        return cls(module, tokenizer, None, cache_tokens, prefill_chunk, deterministic)

    @classmethod
    def from_transformers(
        cls,
        model: Any,
        tokenizer: Any = None,
        *,
        cache_tokens: int | None = None,
        prefill_chunk: int | None = None,
        deterministic: bool = False,
        threads: int | None = None,
    ) -> Model:
        """A loaded Qwen2ForCausalLM of transformers, on the same memory, device and dtype.

        Both models work on, and share every weight: q, k, v and gate, up of transformers' model become views of the
        tensors that we keep them packed in, made one at a time. So a change to a weight of one is a change to both;
        moving or casting transformers' model ends the sharing. Its generation_config gives the defaults.

        tokenizer: a fast tokenizer of transformers, or a Tokenizer. Without one, prompts are token ids and completions
            have no text. The other options are those of from_pretrained.

        Raises RequestError or ConfigError where the model is not one that we run, or its weights cannot be shared."""
        from .integrations.transformers.share import (  # not for everyone
            as_tokenizer,
            generation_defaults,
            shared_module,
        )

        _use_threads(threads)
        module = shared_module(model)
        ours = as_tokenizer(tokenizer, model)
        return cls(module, ours, generation_defaults(model), cache_tokens, prefill_chunk, deterministic)

    def _run(self, sequences: list[engine.Sequence]) -> Generator[tuple[engine.Sequence, str], None, None]:
        if self._steps is None or self._steps.cache is not self.cache:
            self._steps = DecodeSteps(self.module, self.cache)
        limits = engine.Limits(self.prefill_chunk)
        if self.deterministic:
            together = invariant_tokens(self.module.model.norm.weight)
            limits = engine.Limits(self.prefill_chunk, together, alone=True)
        return engine.generate(self.module, self.cache, sequences, limits, self._steps)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **keywords: Any,
    ) -> Completion | list[Completion]:
        """Completes one prompt or a list of them, together and without padding.

        A prompt is a text, a list of token ids, or a list of chat messages. Sampling is given as SamplingParams or by
        its fields as keywords. One prompt with n = 1 gives a Completion; anything else a list of them, prompt by
        prompt, n of each. tools: as in `chat`, for messages."""
        params = _params(params, keywords)
        single = _is_prompt(prompts)
        completions = self._complete(self._sequences([prompts] if single else prompts, params, tools))
        return completions[0] if single and params.n == 1 else completions

    def _complete(self, sequences: list[engine.Sequence]) -> list[Completion]:
        first = [sequence for sequence in sequences if sequence.sample_index == 0]  # the others fork from these
        for _ in self._run(first):
            pass
        return [Completion.of(sequence) for sequence in sequences]

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **keywords: Any,
    ) -> Stream:
        """Completes one prompt and yields its text as it comes, never half a character.

        A model without a tokenizer yields nothing; its ``completion`` has the ids."""
        params = _params(params, keywords)
        if params.n != 1:
            raise RequestError(f"n is {params.n}; a stream has one completion: expected 1")
        [sequence] = self._sequences([prompt], params, tools)
        return Stream(self._run([sequence]), sequence)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **keywords: Any,
    ) -> Completion | list[Completion]:
        """Answers a conversation, rendered by the checkpoint's chat template.

        messages: {"role": "system" | "user" | "assistant" | "tool", "content": text} each. tools: functions that the
        model may call, as JSON schemas; it answers a call in <tool_call> tags."""
        if isinstance(messages, str) or _is_ids(messages):
            raise RequestError(
                f"messages is {shown(messages)}; expected a list of messages, or generate for such a prompt"
            )
        params = _params(params, keywords)
        completions = self._complete(self._sequences([messages], params, tools))
        return completions[0] if params.n == 1 else completions

    @torch.inference_mode()
    def forward(self, ids: Tensor | Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        """Logits after every token: float32 [T, vocabulary] for ids [T], or [B, T, vocabulary] for ids [B, T]."""
        try:
            ids = ids if isinstance(ids, Tensor) else torch.as_tensor(ids, device="cpu")
            rows = ids.tolist() if ids.dim() == 2 else [ids.tolist()]
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:  # ragged, too large, on no device
            raise RequestError(f"ids are {shown(ids)}; expected [T] or [B, T] integers: {error}") from error
        if ids.dtype in _NO_IDS or ids.dtype.is_floating_point or ids.dim() not in (1, 2):
            raise RequestError(
                f"ids have shape {list(ids.shape)} and dtype {ids.dtype}; expected [T] or [B, T] integers"
            )
        if not rows:
            raise RequestError(f"ids have shape {list(ids.shape)}; expected at least one row")
        rows = [torch.cat(list(self._logits(row))) for row in rows]
        return rows[0] if ids.dim() == 1 else torch.stack(rows)

    @torch.inference_mode()
    def score(self, text: str | Sequence[int]) -> Score:
        """Log-probability of every token of a text (or of token ids) after the ones before it.

        Raises NonFiniteError where one of them is not a finite number."""
        ids = self._encode(text)
        logprobs: list[float] = []
        for logits in self._logits(ids):
            targets = torch.tensor(ids[len(logprobs) + 1 :][: len(logits)], device=logits.device)
            logits = logits[: len(targets)]
            chosen = logits.gather(-1, targets[:, None]).squeeze(-1) - logits.logsumexp(-1)
            logprobs += chosen.tolist()
        if wrong := [position for position, value in enumerate(logprobs) if not math.isfinite(value)]:
            raise NonFiniteError.at(wrong[0], self.dtype, "score")
        return Score(ids, logprobs)

    def _logits(self, ids: list[int]) -> Iterator[Tensor]:
        """Logits of a sequence, some tokens at a time."""
        self._check_ids(ids)
        self._room_after(len(ids))
        return engine.all_logits(self.module, self.cache, ids, self.prefill_chunk)

    def _sequences(
        self, prompts: Sequence[Prompt], params: SamplingParams, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[engine.Sequence]:
        """Checked requests: prompt by prompt, n of each, the first of each n with the others as its siblings."""
        params = params.with_defaults(self.generation.sampling)
        self._check_params(params)
        sequences = []
        for prompt_index, prompt in enumerate(prompts):
            ids = self._encode(prompt, tools)
            self._check_ids(ids)
            end_ids = self._end_ids(params, is_chat=not isinstance(prompt, str) and not _is_ids(prompt))
            max_tokens = self._max_tokens(len(ids), params)
            group = [
                engine.Sequence(
                    prompt_ids=ids,
                    params=params,
                    end_ids=end_ids,
                    max_tokens=max_tokens,
                    detokenizer=self.tokenizer and Detokenizer(self.tokenizer, skip_special=params.skip_special_tokens),
                    prompt_index=prompt_index,
                    sample_index=sample_index,
                )
                for sample_index in range(params.n)
            ]
            group[0].siblings = group[1:]
            sequences += group
        if not sequences:
            raise RequestError("prompts is an empty list; expected at least one prompt")
        return sequences

    def _encode(self, prompt: Prompt, tools: Sequence[Mapping[str, Any]] | None = None) -> list[int]:
        if not isinstance(tools, list | tuple | None):
            raise RequestError(f"tools: found {shown(tools)}; expected a list of dicts, one function schema each")
        if _is_ids(prompt):
            if tools:
                raise RequestError("tools need chat messages as the prompt, found token ids")
            if isinstance(prompt, range):
                prompt = prompt[: self.config.context_length + 1]  # more of it would be refused, but after long
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
        return self.tokenizer.encode_chat(prompt, tools=tools)

    def _check_ids(self, ids: list[int]) -> None:
        if not ids:
            raise RequestError("the prompt is empty; expected at least one token")
        low, high = min(ids), max(ids)
        if low < 0 or high >= self.config.vocab_size:
            raise RequestError(
                f"the prompt has token id {shown(low if low < 0 else high)}; expected 0 to {self.config.vocab_size - 1}"
            )

    def _room_after(self, num_tokens: int) -> tuple[int, str]:
        """How many tokens may follow so many, and what would be full then; RequestError where they are too many."""
        cached = self.cache.num_tokens
        room, where = min((self.config.context_length, "context length"), (cached, "key-value cache (cache_tokens)"))
        if num_tokens > room:
            raise RequestError(f"the prompt has {num_tokens} tokens, and the {where} is {room}")
        # the last token that is sampled need not be cached, so a full context still gives one
        return max(1, room - num_tokens), f"the {where} is {room}"

    def _max_tokens(self, num_prompt_tokens: int, params: SamplingParams) -> int:
        """How many tokens may follow the prompt; RequestError where more are asked for than there is room."""
        room, limit = self._room_after(num_prompt_tokens)
        if params.max_tokens is None:
            wanted = self.generation.max_tokens_after(num_prompt_tokens)
            if wanted is not None and wanted < params.min_tokens:
                raise RequestError(
                    f"min_tokens is {params.min_tokens}, and {self.generation.source} allows {wanted} tokens after "
                    f"{num_prompt_tokens} of a prompt; expected max_tokens, which goes before that"
                )
            return room if wanted is None else min(wanted, room)
        if params.max_tokens > room:
            raise RequestError(
                f"the prompt's {num_prompt_tokens} tokens and max_tokens {params.max_tokens} make "
                f"{num_prompt_tokens + params.max_tokens}, and {limit}"
            )
        return params.max_tokens

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
        width = self.config.vocab_size  # a tokenizer may have more ids than the model has logits: those never come
        return frozenset(params.stop_token_ids) | {token for token in ends if token < width}

    def _cache_tokens(self, asked: int | None) -> int:
        """What is asked for, as far as the device has memory for it at all; else the default."""
        asked = whole("cache_tokens", asked, 1, optional=True)
        if asked is None:
            return self._default_cache_tokens()
        on_gpu = self.device.type == "cuda"
        memory = torch.cuda.mem_get_info(self.device)[1] if on_gpu else _machine_memory()
        if (most := memory // self.config.kv_bytes_per_token(self.dtype.itemsize)) < asked:
            raise RequestError(f"cache_tokens is {shown(asked)}; all memory of {self.device} would hold {most}")
        return asked

    def _default_cache_tokens(self) -> int:
        """What is left of a GPU's memory, less a share for activations; on a CPU, where memory is taken only as it is
        used, four contexts or half of the machine's memory."""
        per_token = self.config.kv_bytes_per_token(self.dtype.itemsize)
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            tokens, most = int(free - 0.1 * total) // per_token, 64 * self.config.context_length
        else:
            tokens, most = _machine_memory() // 2 // per_token, 4 * self.config.context_length
        if tokens < 1:
            raise RequestError(f"{self.device} has no memory left for a key-value cache; expected a smaller model")
        return min(tokens, most)


def _params(params: SamplingParams | None, keywords: dict[str, Any]) -> SamplingParams:
    if params is not None and not isinstance(params, SamplingParams):
        raise RequestError(f"params is of type {type(params).__name__}; expected SamplingParams")
    known = {field.name for field in fields(SamplingParams)}
    if unknown := sorted(keywords.keys() - known):
        raise RequestError(
            f"{shown(unknown[0])} is not a sampling parameter; expected one of: {', '.join(sorted(known))}"
        )
    return replace(params or SamplingParams(), **keywords)


def _is_ids(prompt: Any) -> bool:
    return isinstance(prompt, range) or (isinstance(prompt, (list, tuple)) and all(map(is_whole, prompt)))


def _is_prompt(prompts: Any) -> bool:
    """Whether this is one prompt, not a list of them. An empty list is a prompt without tokens."""
    if not isinstance(prompts, (list, tuple, range)):
        return True
    return _is_ids(prompts) or all(isinstance(message, Mapping) for message in prompts)


def _machine_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _use_threads(threads: int | None) -> None:
    """Also looks at what the environment says of the CPU, before any weight is read."""
    threads = whole("threads", threads, 1, c_backend.threads.MOST, optional=True)
    try:
        if threads is not None:
            c_backend.threads.use(threads)
        c_backend.check_environment()
    except ValueError as error:
        raise RequestError(str(error)) from None


def _device(device: str | torch.device) -> torch.device:
    expected = "expected 'auto', 'cpu', 'cuda' or 'cuda:N'"
    if not isinstance(device, (str, torch.device)):
        raise RequestError(f"device is {shown(device)}; {expected}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except (RuntimeError, ValueError, OverflowError) as error:
        raise RequestError(f"device is {shown(device)}; {expected}") from error
    if found.type not in ("cpu", "cuda"):
        raise RequestError(f"device is {shown(device)}; {expected}")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise RequestError(f"device is {shown(device)}, and torch sees {torch.cuda.device_count()} CUDA devices")
    return found


def _dtype(dtype: str | torch.dtype, config: Config, device: torch.device) -> torch.dtype:
    name = str(dtype).removeprefix("torch.") if isinstance(dtype, (str, torch.dtype)) else ""
    if name == "auto":
        name = config.dtype.removeprefix("torch.")
        if name == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            name = "float16"  # before Ampere
        if name not in _DTYPES:
            raise ConfigError(
                f"{config.source}: dtype is {shown(config.dtype)}; expected {', '.join(map(repr, _DTYPES))}, or one of "
                "them given as dtype="
            )
    if name not in _DTYPES:
        raise RequestError(f"dtype is {shown(dtype)} ({name:.80}); expected 'auto', {', '.join(map(repr, _DTYPES))}")
    return _DTYPES[name]
