"""Qwen2 as a module graph of fused ops, written once for every device and every number of tokens.

The ops carry a residual stream: each takes what the sub-layer before it computed (``x``) and the sum of all that came
earlier (``residual``), then adds, normalises and multiplies in one go. Parameters have the names of the checkpoint,
with q, k, v and gate, up packed row by row.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from dataclasses import replace

import torch
from torch import Tensor, nn

from . import kernels as ops
from .cache import Batch, PagedCache
from .config import Config
from .errors import RequestError
from .kernels import Pages

HUGE_PAGE = 2 << 20


class Qwen2(nn.Module):
    """The language model: tokens in, logits out."""

    def __init__(self, config: Config, dtype: torch.dtype, device: torch.device) -> None:
        """Allocates the parameters and leaves their values undefined: load or initialise them next."""
        super().__init__()
        self.config = config
        self.model = Decoder(config, dtype, device)
        self.lm_head = (
            self.model.embed_tokens
            if config.tie_word_embeddings
            else Weights(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
        )

    def forward(self, batch: Batch, cache: PagedCache, rows: Tensor | None = None) -> Tensor:
        """Runs the T tokens of a batch and writes their keys and values into the cache.

        Returns float32 logits [T, vocabulary], or those of ``rows`` only (indices into the batch's tokens)."""
        x, residual = self.model(batch, cache)
        if rows is not None:
            x, residual = x[rows], residual[rows]
        return self.logits(x, residual)

    def logits(self, x: Tensor, residual: Tensor) -> Tensor:
        """Of what the layers made of some tokens [T, K]: float32 [T, vocabulary]."""
        return ops.lm_head(x, residual, self.model.norm.weight, self.config.rms_norm_eps, self.lm_head.weight)

    def greedy(self, batch: Batch, cache: PagedCache) -> tuple[Tensor, Tensor]:
        """As forward, but only the largest logit after each token, [T] float32, and its id, [T]. Of equal ones the
        lowest. It is NaN or +inf where one of the logits is."""
        x, residual = self.model(batch, cache)
        norm_weight, eps = self.model.norm.weight, self.config.rms_norm_eps
        values, ids = ops.lm_head_top_k(x, residual, norm_weight, eps, self.lm_head.weight, 1)
        return values[:, 0], ids[:, 0]

    def untie(self) -> None:
        """Gives the output weights of its own where they were the embedding's. Their values are undefined."""
        weight = self.model.embed_tokens.weight
        self.config = replace(self.config, tie_word_embeddings=False)
        self.lm_head = Weights(*weight.shape, dtype=weight.dtype, device=weight.device)


class Decoder(nn.Module):
    """The stack of layers, between embedding and last norm."""

    def __init__(self, config: Config, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.embed_tokens = Weights(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
        self.layers = nn.ModuleList(DecoderLayer(config, dtype, device) for _ in range(config.num_hidden_layers))
        self.norm = Weights(config.hidden_size, dtype=dtype, device=device)

    def forward(self, batch: Batch, cache: PagedCache) -> tuple[Tensor, Tensor]:
        x, residual = ops.embedding(batch.ids, self.embed_tokens.weight), None
        for layer, pages in zip(self.layers, cache.pages, strict=True):
            x, residual = layer(x, residual, batch, pages, cache.rope.cos_sin)
        return x, residual


class DecoderLayer(nn.Module):
    def __init__(self, config: Config, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.input_layernorm = Weights(config.hidden_size, dtype=dtype, device=device)
        self.self_attn = Attention(config, dtype, device)
        self.post_attention_layernorm = Weights(config.hidden_size, dtype=dtype, device=device)
        self.mlp = MLP(config, dtype, device)

    def forward(
        self, x: Tensor, residual: Tensor | None, batch: Batch, pages: Pages, cos_sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        x, residual = self.self_attn(x, residual, self.input_layernorm.weight, batch, pages, cos_sin)
        return self.mlp(x, residual, self.post_attention_layernorm.weight)


class Attention(nn.Module):
    """Norm, q, k and v, rotary embedding, cache, grouped-query attention, output projection."""

    def __init__(self, config: Config, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.scale = config.head_dim**-0.5
        self.qkv_proj = Weights(config.qkv_size, config.hidden_size, bias=True, dtype=dtype, device=device)
        self.o_proj = Weights(config.hidden_size, config.q_size, dtype=dtype, device=device)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        norm_weight: Tensor,
        batch: Batch,
        pages: Pages,
        cos_sin: Tensor,
    ) -> tuple[Tensor, Tensor]:
        weight, bias = self.qkv_proj.weight, self.qkv_proj.bias
        q, residual = ops.norm_qkv_rope(
            x, residual, norm_weight, self.eps, weight, bias, batch.positions, cos_sin, pages, batch.slots
        )
        if batch.is_decode:
            x = ops.decode_attention(q, pages, batch.block_tables, batch.lengths, self.scale)
        else:
            x = ops.prefill_attention(q, pages, batch.block_tables, batch.lengths, batch.query_starts, self.scale)
        return ops.linear(x.flatten(1), self.o_proj.weight), residual


class MLP(nn.Module):
    """Norm, gate and up, SwiGLU, down projection."""

    def __init__(self, config: Config, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.gate_up_proj = Weights(2 * config.intermediate_size, config.hidden_size, dtype=dtype, device=device)
        self.down_proj = Weights(config.hidden_size, config.intermediate_size, dtype=dtype, device=device)

    def forward(self, x: Tensor, residual: Tensor, norm_weight: Tensor) -> tuple[Tensor, Tensor]:
        x, residual = ops.norm_swiglu_linear(x, residual, norm_weight, self.eps, self.gate_up_proj.weight)
        return ops.linear(x, self.down_proj.weight), residual


class Weights(nn.Module):
    """A ``weight`` and, if asked for, a ``bias``: a name of the checkpoint, whatever op uses it."""

    def __init__(self, *shape: int, bias: bool = False, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        try:
            weight = _empty(shape, dtype, device)
        except (OSError, OverflowError, RuntimeError) as error:  # what mmap and torch say where there is no memory
            reason = str(error).partition("\n")[0]
            raise RequestError(
                f"device {device} gives no memory for weights of shape {list(shape)} in {dtype}: {reason}"
            ) from error
        self.weight = nn.Parameter(weight, requires_grad=False)
        if bias:
            self.bias = nn.Parameter(torch.empty(shape[0], dtype=dtype, device=device), requires_grad=False)


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory; for large tensors on a CPU in huge pages where the system has them, because a processor
    that streams weights fetches further ahead in those."""
    size = math.prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or size < 2 * HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE_PAGE
    return whole[start : start + size].view(dtype).view(shape)


@torch.no_grad()
def initialise(model: Qwen2, seed: int) -> None:
    """Fills the parameters with random numbers in place: what a benchmark needs where no checkpoint is at hand."""
    generator = torch.Generator(model.model.norm.weight.device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and name.endswith("norm.weight"):
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, 0.02, generator=generator)
