"""How a model is made: from a checkpoint, from a configuration, or from a model of transformers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from .arguments import flag, whole
from .cache import PagedCache
from .config import Config
from .conversion import choose_conversion
from .device import check_cache_dtype, choose_device, choose_dtype, choose_pages, use_threads
from .engine import Engine, Limits, Loop, Runner
from .engine.draft_model import DraftModel
from .errors import RequestError, shown
from .footprint import Layout, cache_room, default_chunk, layout_of, refuse_too_large
from .generation import Generation
from .kernels import invariant_tokens
from .loading import load
from .qwen2 import Qwen2, initialise
from .sampling import Grammars
from .text.tokenizer import Tokenizer

M = TypeVar("M", bound="Loaded")
PROBE = "Draft: 你好, été 3.14 <|im_end|>\n\tdef f():"  # if two tokenizers encode it alike, they count as the same


class Loaded:
    """A module with its tokenizer, its cache and its engine. `Model` adds the methods that callers use."""

    def __init__(
        self,
        module: Qwen2,
        tokenizer: Tokenizer | None,
        generation: Generation | None = None,
        cache_tokens: int | None = None,
        prefill_chunk: int | None = None,
        deterministic: bool = False,
        kv_cache_dtype: str | torch.dtype = "auto",
        prefix_cache: bool = True,
        speculate: bool = True,
        draft: Loaded | None = None,
    ) -> None:
        self.module = module
        self.config = module.config
        self.tokenizer = tokenizer
        self.grammars = Grammars(tokenizer, self.config.vocab_size)
        self.generation = generation or Generation()  # the checkpoint's end tokens, limits and sampling
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
        self.prefix_cache = flag("prefix_cache", prefix_cache)
        self.speculate = flag("speculate", speculate)
        self.draft = self._checked_draft(draft)
        self._runner: Runner | None = None
        self._engines: Loop | None = None
        self._starting = threading.Lock()

    @classmethod
    def from_pretrained(
        cls: type[M],
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
        prefix_cache: bool = True,
        speculate: bool = True,
        draft: str | Path | Loaded | None = None,
    ) -> M:
        """Loads a checkpoint.

        model: a hub id ("Qwen/Qwen2.5-3B-Instruct"), a short name ("qwen2.5-3b-instruct", "demo"), a folder of
            safetensors, or a .gguf file. Quantised weights keep their format.
        device: "auto" (CUDA if there is a GPU), "cpu", "cuda", "cuda:1".
        dtype: of activations and of weights that are not quantised: "auto" (that of config.json, else of the first
            weight; bfloat16 for GGUF; float32 if weights are quantised and the device is a CPU), "bfloat16",
            "float16", "float32".
        quantize: None (weights stay as the checkpoint has them); "int8", "int4" or "fp8" rounds dense matrices as they
            load (with "int4", embedding and output to int8); "none" dequantises quantised ones.
        cache_tokens: tokens that the key-value cache holds. All calls share it and wait while it is full.
        prefill_chunk: prompt tokens per forward pass.
        deterministic: a prompt gives the same bits in every batch. Without it, only decode steps of up to 16 sequences
            on qwenkern's kernels are batch-invariant. It costs throughput, not latency: prompts are read one by one, at
            most 16 sequences decode together (one if the linear layers run in torch, as in float16 on a CPU), and a
            sequence starts only when the cache has room for its prompt and its max_tokens.
        threads: CPU threads of this process, torch's included. None: QWENKERN_THREADS, else one for each physical core
            that the process may run on, but not more than its cgroup's quota and torch allow.
        kv_cache_dtype: how the cache stores keys and values: "auto" (in dtype), "float16", "int8", "fp8", or the
            name of dtype. docs/generation.md has the bytes and the errors of each.
        prefix_cache: pages of earlier texts stay in the cache until another text needs them. The common beginning of
            an earlier text and a new prompt is not computed again. With ``deterministic``, results have the same bits
            with and without it.
        speculate: speculative decoding: on a CPU, several tokens that are guessed from the text itself are verified
            together. The text stays the same.
        draft: a smaller model of the family (its name, path or Model) that also guesses tokens, on any device.
        progress: called with the task ("download from <origin>", "load"), the bytes so far, and all bytes.

        Raises CheckpointError, ConfigError or RequestError, which say what was found and what was expected."""
        use_threads(threads)
        check_cache_dtype(kv_cache_dtype)
        if isinstance(draft, str | Path):
            draft = cls.from_pretrained(draft, device=device, dtype=dtype, cache_tokens=64, quantize=quantize)
        loaded = load(model, choose_device(device), dtype, progress, quantize, kv_cache_dtype, cache_tokens)
        return cls(*loaded, cache_tokens, prefill_chunk, deterministic, kv_cache_dtype, prefix_cache, speculate, draft)

    @classmethod
    def from_config(
        cls: type[M],
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
        prefix_cache: bool = True,
        speculate: bool = True,
        draft: Loaded | None = None,
    ) -> M:
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
        return cls(
            module,
            tokenizer,
            None,
            cache_tokens,
            prefill_chunk,
            deterministic,
            kv_cache_dtype,
            prefix_cache,
            speculate,
            draft,
        )

    @classmethod
    def from_transformers(
        cls: type[M],
        model: Any,
        tokenizer: Any = None,
        *,
        cache_tokens: int | None = None,
        prefill_chunk: int | None = None,
        deterministic: bool = False,
        threads: int | None = None,
        kv_cache_dtype: str | torch.dtype = "auto",
        prefix_cache: bool = True,
        speculate: bool = True,
        draft: Loaded | None = None,
    ) -> M:
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
        return cls(
            module,
            ours,
            defaults,
            cache_tokens,
            prefill_chunk,
            deterministic,
            kv_cache_dtype,
            prefix_cache,
            speculate,
            draft,
        )

    @property
    def _loop(self) -> Loop:
        """The loop of the engine that all calls share. The first call makes it."""
        with self._starting:
            if self._runner is None or self._runner.cache is not self.cache:
                self._runner = Runner(self.module, self.cache)
                self._engines = None
            if self._engines is None:
                most = invariant_tokens(self.module.weights())
                rows = most if self.speculate and (self.device.type == "cpu" or self.draft) else 0
                limits = Limits(self.prefill_chunk, finds_prefixes=self.prefix_cache, speculated_rows=rows)
                if self.deterministic:
                    limits = replace(limits, max_batch=most, batch_invariant=True)
                self._engines = Loop(Engine(self._runner, limits, self._draft_model()))
            return self._engines

    def _checked_draft(self, draft: Loaded | None) -> Loaded | None:
        if draft is None:
            return None
        if not isinstance(draft, Loaded):
            raise RequestError(f"draft is {shown(draft)}; expected a model's name, path or Model")
        mine, its = (each.tokenizer and each.tokenizer.encode(PROBE) for each in (self, draft))
        if mine != its or draft.config.vocab_size > self.config.vocab_size:
            raise RequestError(
                f"draft ({draft.config.source}) has another vocabulary than {self.config.source}; expected a smaller "
                "model of the same family"
            )
        return draft

    def _draft_model(self) -> DraftModel | None:
        """The draft model, with a cache for as many tokens as this model's own cache."""
        small = self.draft
        if small is None:
            return None
        pages = type(small.cache.pages[0])
        cache = PagedCache(small.config, self.cache.num_tokens, small.dtype, small.device, pages=pages)
        for of_layer, bias in zip(cache.pages, small.module.k_biases(), strict=True):
            of_layer.adapt(bias)
        return DraftModel(Runner(small.module, cache), self.prefill_chunk)

    def close(self) -> None:
        """Ends all calls with an EngineError, and stops the background thread. The weights stay until the model is
        dropped."""
        self._loop.close()

    def __enter__(self: M) -> M:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
