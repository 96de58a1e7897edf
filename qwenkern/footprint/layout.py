"""The bytes of a model in use: weights and cache exactly, the rest as an allowance.

Weights and pages are allocated without memory (on torch's device `meta`) by the `allocate` of their formats, and their
bytes are counted. So a new format needs no change here.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..cache import PAGE_SIZE
from ..checkpoint.formats import num_vector_values
from ..checkpoint.packing import EMBEDDING, HEAD
from ..config import Config
from ..kernels import Pages, Weight
from ..kernels.pages import DensePages
from ..kernels.weights import Dense

# Allowances, in bytes. For a process, on a CPU: Python, torch and a tokenizer. On a GPU: CUDA's context, the code of
# the libraries, and their workspaces.
OF_A_PROCESS = 512 << 20
_LAUNCH = 32 << 10  # of a launch in a captured CUDA graph
_LAUNCHES_OF_A_STEP, _LAUNCHES_OF_A_PROMPT, _PROMPT_LENGTHS = 6, 10, 16  # launches per layer; engine/capture.py
_PACKED = 2  # matrices in one product: gate and up
_LOGITS_OF_A_SEQUENCE = 4  # rows of 4-byte numbers: logits, their probabilities, history and bias


@dataclass(frozen=True)
class Footprint:
    """Bytes of a model in use. ``weights`` and ``cache`` are exact, the others are allowances (docs/footprint.md)."""

    weights: int
    cache: int
    activations: int
    graphs: int
    process: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.activations + self.graphs + self.process


@dataclass(frozen=True)
class Layout:
    """A model's configuration, and the formats of its weights and its cache.

    matrices: by Hugging Face's name, without memory. dtype: of activations, norms, biases and dense matrices."""

    config: Config
    matrices: Mapping[str, Weight]
    dtype: torch.dtype
    on_gpu: bool
    pages: type[Pages] = DensePages

    @functools.cached_property
    def weights(self) -> int:
        """Bytes of all weights."""
        return self.vectors + sum(self.weights_by_format.values())

    @functools.cached_property
    def weights_by_format(self) -> dict[str, int]:
        """Bytes of the matrices in each format. The key of dense matrices is their dtype."""
        found: Counter[str] = Counter()
        for weight in self.matrices.values():
            found[_name(weight.dtype) if isinstance(weight, Dense) else weight.format] += weight.nbytes
        return dict(found.most_common())

    @property
    def vectors(self) -> int:
        """Bytes of the norms and biases."""
        return num_vector_values(self.config) * self.dtype.itemsize

    def cache(self, num_pages: int) -> int:
        """Bytes of ``num_pages`` pages and the spare page, in all layers."""
        config = self.config
        shape = num_pages + 1, PAGE_SIZE, config.num_key_value_heads, config.head_dim
        return config.num_hidden_layers * self.pages.allocate(*shape, self.dtype, torch.device("meta")).nbytes

    @property
    def cache_name(self) -> str:
        """The dtype of dense pages, or the format of other pages."""
        return _name(self.dtype) if self.pages is DensePages else self.pages.format

    @property
    def token(self) -> int:
        """Bytes of a token in the cache, rounded down."""
        return self.page // PAGE_SIZE

    @staticmethod
    def pages_for(tokens: int) -> int:
        return -(-tokens // PAGE_SIZE)

    @property
    def page(self) -> int:
        """Bytes of a page of all layers."""
        return self.cache(1) - self.cache(0)

    def activations(self, tokens: int, rows: int, positions: int) -> int:
        """Bytes for a forward pass over ``tokens`` tokens, with ``rows`` rows of logits, in a cache up to position
        ``positions``."""
        config, size = self.config, self.dtype.itemsize
        # the maximum, in the MLP: gate and up, their product, the residual stream, its norm, q and the output
        hidden = tokens * (3 * config.intermediate_size + 4 * config.hidden_size) * size
        angles = min(positions, config.context_length) * config.head_dim * 4
        return hidden + rows * config.vocab_size * 4 + angles + self.scratch(tokens)

    def scratch(self, tokens: int) -> int:
        """Bytes of dequantised rows of a layer's matrix, for its product with many tokens: on a CPU all rows, on a GPU
        those that are dequantised at a time."""
        if tokens <= (PACKED_TOKENS if self.on_gpu else FEW_TOKENS):
            return 0
        whole = _PACKED * self._packed_values * self.dtype.itemsize
        return min(whole, SCRATCH) if self.on_gpu else whole

    @functools.cached_property
    def _packed_values(self) -> int:
        """Values of the largest quantised matrix of a layer."""
        layers = [weight for name, weight in self.matrices.items() if name not in (EMBEDDING, HEAD)]
        return max([math.prod(weight.shape) for weight in layers if not isinstance(weight, Dense)], default=0)

    def graphs(self, sequences: int) -> int:
        """Bytes of the captured decode steps for up to ``sequences`` sequences, and of the captured forward passes over
        prompts."""
        if not self.on_gpu:
            return 0
        of_a_prompt = _LAUNCHES_OF_A_PROMPT * (2 if self._packed_values else 1)  # also launches that dequantise rows
        launches = _LAUNCHES_OF_A_STEP * captured_steps(sequences) + of_a_prompt * _PROMPT_LENGTHS
        return self.config.num_hidden_layers * launches * _LAUNCH

    def footprint(self, context: int, sequences: int = 1, prefill_chunk: int | None = None) -> Footprint:
        """The footprint with ``sequences`` sequences of ``context`` tokens at once. ``prefill_chunk`` as in
        Model.from_pretrained."""
        pages = sequences * self.pages_for(context)
        tokens = min(prefill_chunk or default_chunk(self.on_gpu), sequences * context)
        return Footprint(
            weights=self.weights,
            cache=self.cache(pages),
            activations=self.activations(tokens, _LOGITS_OF_A_SEQUENCE * sequences, pages * PAGE_SIZE),
            graphs=self.graphs(sequences),
            process=OF_A_PROCESS,
        )

    def least(self) -> Footprint:
        """The least that the model needs to run: one page of the cache, a forward pass over one token, nothing
        captured. The memory of the process does not count, because it is already in use."""
        return Footprint(self.weights, self.cache(1), self.activations(1, 1, PAGE_SIZE), graphs=0, process=0)

    def longest_context(self, memory: int, sequences: int = 1, prefill_chunk: int | None = None) -> int:
        """The most tokens, in whole pages, that each of ``sequences`` sequences can have in ``memory`` bytes; at most
        the model's context length. 0 if nothing fits."""
        low, high = 0, self.pages_for(self.config.context_length)
        while low < high:
            middle = (low + high + 1) // 2
            if self.footprint(middle * PAGE_SIZE, sequences, prefill_chunk).total <= memory:
                low = middle
            else:
                high = middle - 1
        return min(low * PAGE_SIZE, self.config.context_length)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


FEW_TOKENS = 16  # up to this number of tokens, a matrix is not dequantised for a product
PACKED_TOKENS, SCRATCH = 48, 1 << 26  # the same on a GPU; bytes of rows at a time (kernels/triton/many_tokens.py)


def default_chunk(on_gpu: bool) -> int:
    """Prompt tokens per forward pass, for a model that is loaded without prefill_chunk."""
    return 4096 if on_gpu else 512


def captured_steps(sequences: int) -> int:
    """The number of captured decode steps on a GPU: for 1, 2, 4 and 8 sequences, then for multiples of 8."""
    return (min(sequences, 8) - 1).bit_length() + 1 + max(0, -(-sequences // 8) - 1)
