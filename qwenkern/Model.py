"""The facade: loads a model, and computes text, log-probabilities or logits from prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor

from .arguments import flag, whole
from .cache import PagedCache
from .config import Config
from .conversion import choose_conversion
from .device import check_cache_dtype, choose_device, choose_dtype, choose_pages, use_threads
from .engine import Completion, Engine, Limits, Request, Runner, Score, Stream
from .engine.warm_up import BY_DEFAULT, GREEDY, compile_kernels, decode_sizes, prompt_lengths, rehearsals
from .errors import NonFiniteError, RequestError, shown
from .footprint import Layout, cache_room, default_chunk, layout_of, refuse_too_large
from .generation import Generation
from .kernels import invariant_tokens, prepare
from .loading import load
from .prompts import Prompt, Prompts, is_ids, is_one_prompt, rows_of_ids, sampling_params
from .qwen2 import Qwen2, initialise
from .sampling import Drawing, SamplingParams
from .text.tokenizer import Tokenizer


class Model:
    """A Qwen2.5 model on one device.

    >>> model = Model.from_pretrained("Qwen/Qwen2.5-3B-Instruct")
    >>> model.chat([{"role": "user", "content": "Hello!"}]).text

    Several threads may use it: forward passes take turns, and calls wait while the key-value cache is full."""

    def __init__(
        self,
        module: Qwen2,
        tokenizer: Tokenizer | None,
        generation: Generation | None = None,
        cache_tokens: int | None = None,
        prefill_chunk: int | None = None,
        deterministic: bool = False,
        kv_cache_dtype: str | torch.dtype = "auto",
    ) -> None:
        self.module = module
        self.config = module.config
        self.tokenizer = tokenizer
        self.generation = generation or Generation()  # what the checkpoint says about it
        self.dtype = module.model.norm.weight.dtype
        self.device = module.model.norm.weight.device
        chunk = whole("prefill_chunk", prefill_chunk, 1, optional=True)
        self.prefill_chunk = chunk or default_chunk(self.device.type == "cuda")
        pages = choose_pages(kv_cache_dtype, self.dtype)
        weights = sum(parameter.nbytes for parameter in module.parameters())
        layout = Layout(self.config, {}, self.dtype, self.device.type == "cuda", pages)
        room = cache_room(layout, self.device, cache_tokens, self.prefill_chunk, weights)
        self.cache = PagedCache(self.config, room, self.dtype, self.device, pages=pages)
        for of_layer, bias in zip(self.cache.pages, module.k_biases(), strict=True):
            of_layer.adapt(bias)
        self.deterministic = flag("deterministic", deterministic)
        self._runner: Runner | None = None

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
        quantize: str | None = None,
        kv_cache_dtype: str | torch.dtype = "auto",
    ) -> Model:
        """Loads a checkpoint.

        model: a hub id ("Qwen/Qwen2.5-3B-Instruct"), a short name ("qwen2.5-3b-instruct", "demo"), a folder of
            safetensors, or a .gguf file. Quantised weights stay as they are.
        device: "auto" (CUDA if there is a GPU), "cpu", "cuda", "cuda:1".
        dtype: of activations and of weights that are not quantised: "auto" (that of config.json, else of the first
            weight; bfloat16 for GGUF; float32 if weights are quantised and the device is a CPU), "bfloat16",
            "float16", "float32".
        quantize: None (weights stay as the checkpoint has them); "int8", "int4" or "fp8" rounds dense matrices as they
            load (with "int4", embedding and output to int8); "none" dequantises quantised ones.
        cache_tokens: tokens that the key-value cache holds. All calls share it and wait while it is full.
        prefill_chunk: prompt tokens per pass.
        deterministic: a prompt gives the same bits in every batch. Without it, only decode steps of up to 16 sequences
            on our kernels are batch-invariant. It costs throughput, not latency: prompts are read one by one, at most
            16 sequences decode together (one if the linears run in torch, as in float32 on a CPU), and a sequence
            starts only when the cache has room for its prompt and its max_tokens.
        threads: CPU threads of this process, torch's included. None: QWENKERN_THREADS, else one for each physical core
            that the process may run on, but not more than its cgroup's quota and torch allow.
        kv_cache_dtype: how the cache stores keys and values: "auto" (in dtype), "float16", "int8", "fp8", or the
            name of dtype. docs/generation.md has the bytes and the errors of each.
        progress: called with the task ("download from <origin>", "load"), the bytes so far, and all bytes.

        Raises CheckpointError, ConfigError or RequestError, which say what was found and what was expected."""
        use_threads(threads)
        check_cache_dtype(kv_cache_dtype)
        loaded = load(model, choose_device(device), dtype, progress, quantize, kv_cache_dtype, cache_tokens)
        return cls(*loaded, cache_tokens, prefill_chunk, deterministic, kv_cache_dtype)

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
        quantize: str | None = None,
        kv_cache_dtype: str | torch.dtype = "auto",
    ) -> Model:
        """Makes a model with random weights from a Config, or from a size of the family such as "qwen2.5-3b".

        Without a tokenizer, prompts are token ids and completions have no text."""
        use_threads(threads)
        config = Config.from_name(config) if isinstance(config, str) else config
        if not isinstance(config, Config):
            raise RequestError(f"config is of type {type(config).__name__}; expected a Config or a name")
        if not isinstance(tokenizer, Tokenizer | None):
            raise RequestError(f"tokenizer is of type {type(tokenizer).__name__}; expected a Tokenizer or None")
        seed = whole("seed", seed, -(2**63), 2**64 - 1)
        conversion = choose_conversion(quantize)
        check_cache_dtype(kv_cache_dtype)
        device = choose_device(device)
        dtype = choose_dtype(dtype, config, device, conversion.is_quantised)
        cache_tokens = whole("cache_tokens", cache_tokens, 1, optional=True)
        layout = layout_of(config, device, quantize=quantize, dtype=dtype, kv_cache_dtype=kv_cache_dtype)
        refuse_too_large(layout, device, config.source, cache_tokens)
        module = Qwen2(config, dtype, device, allocated=False)
        initialise(module, seed, conversion.quantised if conversion.is_quantised else None)
        return cls(module, tokenizer, None, cache_tokens, prefill_chunk, deterministic, kv_cache_dtype)

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
        kv_cache_dtype: str | torch.dtype = "auto",
    ) -> Model:
        """A loaded Qwen2ForCausalLM of transformers, on the same memory, device and dtype.

        Both models work afterwards, and share every weight: q, k, v and gate, up of transformers' model become views of
        packed tensors, which are made one at a time. So a change to a weight of one model is a change to both. Moving
        or casting transformers' model ends the sharing. Its generation_config gives the defaults.

        tokenizer: a fast tokenizer of transformers, or a Tokenizer. Without one, prompts are token ids and completions
            have no text. The other options are those of from_pretrained.

        Raises RequestError or ConfigError if the model is not supported, or if its weights cannot be shared."""
        from .integrations.transformers.share import (  # only here, because it needs transformers
            as_tokenizer,
            generation_defaults,
            shared_module,
        )

        use_threads(threads)
        module = shared_module(model)
        ours = as_tokenizer(tokenizer, model)
        defaults = generation_defaults(model)
        return cls(module, ours, defaults, cache_tokens, prefill_chunk, deterministic, kv_cache_dtype)

    def _engine(self) -> Engine:
        """An engine for one call. All of them share the cache and the captured steps."""
        if self._runner is None or self._runner.cache is not self.cache:
            self._runner = Runner(self.module, self.cache)
        limits = Limits(self.prefill_chunk)
        if self.deterministic:
            limits = Limits(self.prefill_chunk, invariant_tokens(self.module.model.norm.weight), batch_invariant=True)
        return Engine(self._runner, limits)

    def warm_up(self, max_sequences: int = 1, max_prompt: int = 512, sampled: bool = True) -> None:
        """Compiles and captures what later calls will need, so that none of them waits for it: call it once, before
        the first request.

        On a GPU, child processes compile the kernels into Triton's cache, which takes seconds to a minute, once on a
        machine. Then the passes over prompts and the decode steps are captured. On a CPU, the C functions are compiled
        or chosen, and the decode steps are recorded. Calls that run at the same time continue.

        max_sequences: the largest number of sequences that will decode together.
        max_prompt: the largest number of prompt tokens that will be read at once, up to `prefill_chunk`.
        sampled: also for the checkpoint's own sampling settings, not for greedy decoding alone."""
        whole("max_sequences", max_sequences, 1)
        whole("max_prompt", max_prompt, 1)
        flag("sampled", sampled)
        prepare(self.device, self.dtype)
        engine = self._engine()
        capture, cache = engine.runner.captured.capture, self.cache
        together = min(max_sequences, engine.scheduler.limits.max_batch, cache.num_pages)
        most = min(max_prompt, self.prefill_chunk, self.config.context_length, cache.num_tokens)
        sizes, lengths = decode_sizes(capture, together), prompt_lengths(capture, most)
        ways = (GREEDY, BY_DEFAULT) if sampled else (GREEDY,)
        drawings = {Drawing.of(self._requests([[0]], how), self.config.vocab_size): None for how in ways}
        compile_kernels(self.module, cache, sizes, list(drawings), lengths, most)
        for tokens, params in rehearsals(sizes, together, ways, lengths, most):
            self._complete(self._requests([[0] * min(tokens, most)], params))

    @overload
    def generate(
        self,
        prompts: Prompt,
        params: None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        n: Literal[1] = 1,
        **keywords: Any,
    ) -> Completion: ...
    @overload
    def generate(
        self,
        prompts: list[str] | list[list[int]] | list[list[dict[str, Any]]],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **keywords: Any,
    ) -> list[Completion]: ...
    @overload
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **keywords: Any,
    ) -> Completion | list[Completion]: ...
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **keywords: Any,
    ) -> Completion | list[Completion]:
        """Completes one prompt or a list of prompts, which run together without padding.

        A prompt is a text, a list of token ids, or a list of chat messages. Sampling is given as SamplingParams, or by
        its fields as keywords. One prompt with n = 1 gives a Completion. Otherwise the result is a list, with n
        completions of the first prompt, then those of the second. tools: as in `chat`, for messages."""
        params = sampling_params(params, keywords)
        single = is_one_prompt(prompts)
        listed = cast("Sequence[Prompt]", [prompts] if single else prompts)
        completions = self._complete(self._requests(listed, params, tools))
        return completions[0] if single and params.n == 1 else completions

    def _complete(self, requests: list[Request]) -> list[Completion]:
        first = [request for request in requests if request.sample_index == 0]  # the others fork from these
        for _ in self._engine().run(first):
            pass
        return [Completion.of(request) for request in requests]

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
        params = sampling_params(params, keywords)
        if params.n != 1:
            raise RequestError(f"n is {params.n}; a stream has one completion: expected 1")
        [request] = self._requests([prompt], params, tools)
        return Stream(self._engine().run([request]), request)

    @overload
    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        n: Literal[1] = 1,
        **keywords: Any,
    ) -> Completion: ...
    @overload
    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **keywords: Any,
    ) -> Completion | list[Completion]: ...
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
        model may call, as JSON schemas. It writes a call in <tool_call> tags."""
        if isinstance(messages, str) or is_ids(messages):
            raise RequestError(
                f"messages is {shown(messages)}; expected a list of messages, or generate for such a prompt"
            )
        params = sampling_params(params, keywords)
        completions = self._complete(self._requests([messages], params, tools))
        return completions[0] if params.n == 1 else completions

    @torch.inference_mode()
    def forward(self, ids: Tensor | Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        """Logits after every token: float32 [T, vocabulary] for ids [T], or [B, T, vocabulary] for ids [B, T].

        Raises RequestError if a GPU has no memory left for them (`score` needs little). The default cache leaves room
        for those of one ``prefill_chunk`` if 17 GB are free beside the weights."""
        rows, is_batch = rows_of_ids(ids)
        parts = [self._logits(row) for row in rows]
        shape = len(rows), len(rows[0]), self.config.vocab_size
        try:
            logits = torch.empty(shape, dtype=torch.float32, device=self.device)
        except torch.OutOfMemoryError as error:
            raise RequestError(
                f"ids has {len(rows)} x {len(rows[0])} tokens, whose logits take {4e-9 * math.prod(shape):.1f} GB, "
                f"more than {self.device} has left: expected fewer tokens, or a smaller cache_tokens of the model"
            ) from error
        for row, its_parts in zip(logits, parts, strict=True):
            start = 0
            for part in its_parts:
                row[start : start + len(part)] = part
                start += len(part)
        return logits if is_batch else logits[0]

    @torch.inference_mode()
    def score(self, text: str | Sequence[int]) -> Score:
        """The log-probability of every token of a text, or of token ids, given the tokens before it.

        Raises NonFiniteError if one of them is not finite."""
        ids = self._prompts.encode(text)
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
        self._prompts.check(ids)
        request = Request(ids, SamplingParams(), frozenset(), max_tokens=0, wants_logits=True)
        return chain.from_iterable(output.logits or () for output in self._engine().run([request]))

    @property
    def _prompts(self) -> Prompts:
        return Prompts(self.config, self.tokenizer, self.generation, self.cache.num_tokens)

    def _requests(
        self, prompts: Sequence[Prompt], params: SamplingParams, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[Request]:
        return self._prompts.requests(prompts, params, tools)
