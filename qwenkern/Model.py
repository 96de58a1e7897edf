"""The facade: text, log-probabilities and logits from prompts. loaded.py loads the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor

from .arguments import flag, whole
from .cache import saved
from .engine import AsyncCall, AsyncStream, Call, Completion, Request, Score, Stream
from .engine.speculation import SIZES
from .engine.warm_up import BY_DEFAULT, GREEDY, compile_kernels, decode_sizes, prompt_lengths, rehearsals
from .errors import NonFiniteError, RequestError, shown
from .kernels import prepare
from .loaded import Loaded
from .prompts import Prompt, Prompts, is_ids, is_one_prompt, rows_of_ids, sampling_params
from .sampling import Drawing, SamplingParams


class Model(Loaded):
    """A Qwen2.5 model on one device.

    >>> model = Model.from_pretrained("Qwen/Qwen2.5-3B-Instruct")
    >>> model.chat([{"role": "user", "content": "Hello!"}]).text

    Any number of threads and coroutines may use it at once. Their requests run together on one engine, in a background
    thread, and wait while the key-value cache is full. ``close``, or the end of a with statement, stops the thread."""

    def warm_up(self, max_sequences: int = 1, max_prompt: int = 512, sampled: bool = True) -> None:
        """Compiles and captures what later calls will need, so that none of them waits for it: call it once, before
        the first request.

        On a GPU, child processes compile the kernels into Triton's cache, which takes seconds to a minute, once on a
        machine. Then the forward passes over prompts and the decode steps are captured. On a CPU, the C functions are
        compiled or chosen, and the decode steps are recorded. Calls that run at the same time continue.

        max_sequences: the largest number of sequences that will decode together.
        max_prompt: the largest number of prompt tokens that will be read at once, up to `prefill_chunk`.
        sampled: whether to prepare for the checkpoint's sampling settings, too, and not only for greedy decoding."""
        whole("max_sequences", max_sequences, 1)
        whole("max_prompt", max_prompt, 1)
        flag("sampled", sampled)
        prepare(self.device, self.dtype)
        loop, engine = self._loop, self._loop.engine
        capture, cache = engine.runner.captured.capture, self.cache
        together = min(max_sequences, engine.scheduler.limits.max_batch, cache.num_pages)
        most = min(max_prompt, self.prefill_chunk, self.config.context_length, cache.num_tokens)
        sizes, lengths = decode_sizes(capture, together), prompt_lengths(capture, most)
        ways = (GREEDY, BY_DEFAULT) if sampled else (GREEDY,)
        drawings = {Drawing.of(self._requests([[0]], how), self.config.vocab_size): None for how in ways}
        compile_kernels(self.module, cache, sizes, list(drawings), lengths, most)
        for tokens, params in rehearsals(sizes, together, ways, lengths, most):
            self._complete(self._requests([[0] * min(tokens, most)], params))
        if engine.speculation:
            for size in SIZES:
                loop.between_passes(partial(engine.runner.captured.get, size))

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
        with Call(self._loop, _first_of_each(requests)) as call:
            for _ in call:
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
        """Completes one prompt and yields its text as it is generated, in pieces of whole characters.

        Without a tokenizer the stream yields nothing, and its ``completion`` has the token ids."""
        request = self._streamed(prompt, sampling_params(params, keywords), tools)
        return Stream(Call(self._loop, [request]), request)

    def _streamed(self, prompt: Prompt, params: SamplingParams, tools: Sequence[Mapping[str, Any]] | None) -> Request:
        if params.n != 1:
            raise RequestError(f"n is {params.n}; a stream has one completion: expected 1")
        [request] = self._requests([prompt], params, tools)
        request.is_streamed = True
        return request

    async def agenerate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **keywords: Any,
    ) -> Completion | list[Completion]:
        """`generate` for coroutines. A cancelled task ends its requests."""
        params = sampling_params(params, keywords)
        single = is_one_prompt(prompts)
        listed = cast("Sequence[Prompt]", [prompts] if single else prompts)
        requests = self._requests(listed, params, tools)
        async with AsyncCall(self._loop, _first_of_each(requests), only_last=True) as call:
            async for _ in call:
                pass
        completions = [Completion.of(request) for request in requests]
        return completions[0] if single and params.n == 1 else completions

    def astream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **keywords: Any,
    ) -> AsyncStream:
        """`stream` for coroutines: ``async for piece in model.astream(prompt)``."""
        request = self._streamed(prompt, sampling_params(params, keywords), tools)
        return AsyncStream(AsyncCall(self._loop, [request]), request)

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
                f"messages is {shown(messages)}; expected a list of messages (generate takes a text or token ids)"
            )
        params = sampling_params(params, keywords)
        completions = self._complete(self._requests([messages], params, tools))
        return completions[0] if params.n == 1 else completions

    def forward(self, ids: Tensor | Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        """Logits after every token: float32 [T, vocabulary] for ids [T], or [B, T, vocabulary] for ids [B, T].

        Raises RequestError if the GPU has no memory left for the logits; `score` needs little memory. The default cache
        leaves room for the logits of one ``prefill_chunk`` if 17 GB are free beside the weights."""
        rows, is_batch = rows_of_ids(ids)
        for row in rows:
            self._prompts.check(row)
        shape = len(rows), len(rows[0]), self.config.vocab_size
        try:
            logits = torch.empty(shape, dtype=torch.float32, device=self.device)
        except torch.OutOfMemoryError as error:
            raise RequestError(
                f"ids has {len(rows)} x {len(rows[0])} tokens, whose logits take {4e-9 * math.prod(shape):.1f} GB, "
                f"more than {self.device} has left: expected fewer tokens, or a smaller cache_tokens of the model"
            ) from error
        ends = [0] * len(rows)

        def keep(index: int, part: Tensor) -> None:
            start, ends[index] = ends[index], ends[index] + len(part)
            logits[index, start : ends[index]] = part

        self._read(rows, keep)
        return logits if is_batch else logits[0]

    def score(self, text: str | Sequence[int]) -> Score:
        """The log-probability of every token of a text, or of token ids, given the tokens before it.

        Raises NonFiniteError if one of them is not finite."""
        ids = self._prompts.encode(text)
        self._prompts.check(ids)
        logprobs: list[float] = []

        def add(_: int, logits: Tensor) -> None:
            targets = torch.tensor(ids[len(logprobs) + 1 :][: len(logits)], device=logits.device)
            logits = logits[: len(targets)]
            chosen = logits.gather(-1, targets[:, None]).squeeze(-1) - logits.logsumexp(-1)
            logprobs.extend(chosen.tolist())

        self._read([ids], add)
        if wrong := [position for position, value in enumerate(logprobs) if not math.isfinite(value)]:
            raise NonFiniteError.at(wrong[0], self.dtype, "score")
        return Score(ids, logprobs)

    def save_prefix(self, prompt: Prompt, file: str | Path, *, cache_salt: str | None = None) -> int:
        """Computes a prompt and saves its keys and values to a file, for `load_prefix`. Returns the number of saved
        tokens: only full pages of 64 tokens are saved, or with ``deterministic`` only whole chunks.

        file: replaced if it exists. It is about as large as these tokens are in the cache (`qwenkern footprint`)."""
        ids = self._prompts.encode(prompt)
        self.generate(ids, max_tokens=1, cache_salt=cache_salt)
        tensors = self._loop.between_passes(lambda: saved.copied(self.cache, ids, cache_salt or ""))
        saved.write(Path(file), tensors, self._facts_of_pages())
        return len(tensors[saved.IDS])

    def load_prefix(self, file: str | Path, *, cache_salt: str | None = None) -> int:
        """Puts a saved prefix into the cache, for prompts that begin with it. Returns its number of tokens.

        The prefix stays in the cache until other texts need its pages. Raises CheckpointError if the file was saved by
        another model, or in another dtype or format of the cache, and RequestError if the cache has no room for it."""
        facts = self._facts_of_pages()
        if not self.deterministic:
            del facts["chunk"]
        tensors = saved.read(Path(file), facts, self.cache)
        return self._loop.between_passes(lambda: saved.put_back(self.cache, tensors, cache_salt or ""))

    def _facts_of_pages(self) -> dict[str, str]:
        """The properties that the model which loads a saved prefix must have in common with the one that saved it."""
        return {
            "model": self.module.fingerprint(),
            "dtype": str(self.dtype).removeprefix("torch."),
            "cache": self.cache.pages[0].format,
            # deterministic mode finds only whole chunks again, so their length must be the same
            "chunk": str(self.prefill_chunk) if self.deterministic else "any",
        }

    def _read(self, rows: list[list[int]], take: Callable[[int, Tensor], None]) -> None:
        """Computes the logits of all rows. ``take`` is called with the index of a row and the next part of its logits,
        in inference mode."""
        requests = []
        for index, ids in enumerate(rows):
            request = Request(ids, SamplingParams(), frozenset(), max_tokens=0)
            request.on_logits = torch.inference_mode()(partial(take, index))
            requests.append(request)
        with Call(self._loop, requests) as call:
            for _ in call:
                pass

    @property
    def _prompts(self) -> Prompts:
        return Prompts(self.config, self.tokenizer, self.generation, self.cache.num_tokens, self.grammars)

    def _requests(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        shorten: bool = False,
    ) -> list[Request]:
        return self._prompts.requests(prompts, params, tools, continue_final_message, shorten)


def _first_of_each(requests: list[Request]) -> list[Request]:
    """The first completion of each prompt, from which the others fork."""
    return [request for request in requests if request.sample_index == 0]
