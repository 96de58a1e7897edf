"""Qwen2 as a module graph of fused ops, written once for every device and every number of tokens.

``x`` is the residual stream. A sub-layer begins with an op that normalises x and multiplies, and ends with a projection
that adds x to its product. Parameters have the names of the checkpoint, with q, k, v and gate, up packed row by row.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from . import kernels as ops
from .allocation import allocate
from .cache import Batch, PagedCache
from .config import Config
from .errors import RequestError
from .kernels import Pages, Weight
from .kernels.weights import Dense


class Qwen2(nn.Module):
    """The language model: tokens in, logits out."""

    def __init__(self, config: Config, dtype: torch.dtype, device: torch.device, weights: type[Weight] = Dense) -> None:
        """Allocates the parameters and leaves their values undefined: load or initialise them next.

        ``weights`` is the format of the layers' linear weights; embedding and output are dense."""
        super().__init__()
        self.config = config
        self.model = Decoder(config, dtype, device, weights)
        self.lm_head = (
            self.model.embed_tokens
            if config.tie_word_embeddings
            else Linear(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
        )

    def forward(self, batch: Batch, cache: PagedCache, rows: Tensor | None = None) -> Tensor:
        """Runs the T tokens of a batch and writes their keys and values into the cache.

        Returns float32 logits [T, vocabulary], or those of ``rows`` only (indices into the batch's tokens)."""
        x = self.model(batch, cache)
        return self.logits(x if rows is None else x[rows])

    def logits(self, x: Tensor) -> Tensor:
        """Of what the layers made of some tokens [T, K]: float32 [T, vocabulary]."""
        return ops.lm_head(x, self.model.norm.weight, self.config.rms_norm_eps, self.lm_head.value)

    def greedy(self, batch: Batch, cache: PagedCache) -> tuple[Tensor, Tensor]:
        """As forward, but only the largest logit after each token, [T] float32, and its id, [T]. Of equal ones the
        lowest. It is NaN or +inf where one of the logits is."""
        x = self.model(batch, cache)
        norm_weight, eps = self.model.norm.weight, self.config.rms_norm_eps
        values, ids = ops.lm_head_top_k(x, norm_weight, eps, self.lm_head.value, 1)
        return values[:, 0], ids[:, 0]

    @property
    def is_quantised(self) -> bool:
        """Whether any of its matrices is."""
        return any(not isinstance(each.value, Dense) for each in self.modules() if isinstance(each, Linear))

    def k_biases(self) -> list[Tensor]:
        """What each layer adds to k before it is rotated: [Hkv, D]."""
        sizes = [self.config.q_size, self.config.kv_size, self.config.kv_size]
        layers = [cast(DecoderLayer, layer).self_attn.qkv_proj.bias for layer in self.model.layers]
        return [bias.detach().split(sizes)[1].unflatten(0, (-1, self.config.head_dim)) for bias in layers]

    def untie(self) -> None:
        """Gives the output weights of its own where they were the embedding's. Their values are undefined."""
        weight = self.model.embed_tokens.get_parameter("weight")
        rows, columns = weight.shape
        self.config = replace(self.config, tie_word_embeddings=False)
        self.lm_head = Linear(rows, columns, dtype=weight.dtype, device=weight.device)


class Decoder(nn.Module):
    """The stack of layers, between embedding and last norm."""

    def __init__(self, config: Config, dtype: torch.dtype, device: torch.device, weights: type[Weight] = Dense) -> None:
        super().__init__()
        self.embed_tokens = Linear(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
        self.layers = nn.ModuleList(
            DecoderLayer(config, dtype, device, weights) for _ in range(config.num_hidden_layers)
        )
        self.norm = Norm(config.hidden_size, dtype, device)

    def forward(self, batch: Batch, cache: PagedCache) -> Tensor:
        """The residual stream [T, K] after the last layer."""
        x: Tensor = ops.embedding(batch.ids, self.embed_tokens.value)
        for layer, pages in zip(self.layers, cache.pages, strict=True):
            x = layer(x, batch, pages, cache.rope.cos_sin)
        return x


class DecoderLayer(nn.Module):
    def __init__(self, config: Config, dtype: torch.dtype, device: torch.device, weights: type[Weight] = Dense) -> None:
        super().__init__()
        self.input_layernorm = Norm(config.hidden_size, dtype, device)
        self.self_attn = Attention(config, dtype, device, weights)
        self.post_attention_layernorm = Norm(config.hidden_size, dtype, device)
        self.mlp = MLP(config, dtype, device, weights)

    def forward(self, x: Tensor, batch: Batch, pages: Pages, cos_sin: Tensor) -> Tensor:
        x = self.self_attn(x, self.input_layernorm.weight, batch, pages, cos_sin)
        return self.mlp(x, self.post_attention_layernorm.weight)


class Attention(nn.Module):
    """Norm, q, k and v, rotary embedding, cache, grouped-query attention, output projection, sum with x."""

    def __init__(self, config: Config, dtype: torch.dtype, device: torch.device, weights: type[Weight] = Dense) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.scale = config.head_dim**-0.5
        self.qkv_proj = Linear(
            config.qkv_size, config.hidden_size, bias=True, dtype=dtype, device=device, weights=weights
        )
        self.o_proj = Linear(config.hidden_size, config.q_size, dtype=dtype, device=device, weights=weights)

    def forward(self, x: Tensor, norm_weight: Tensor, batch: Batch, pages: Pages, cos_sin: Tensor) -> Tensor:
        weight, bias = self.qkv_proj.value, self.qkv_proj.bias
        q = ops.norm_qkv_rope(x, norm_weight, self.eps, weight, bias, batch.positions, cos_sin, pages, batch.slots)
        if batch.is_decode:
            y = ops.decode_attention(q, pages, batch.block_tables, batch.lengths, self.scale)
        else:
            y = ops.prefill_attention(q, pages, batch.block_tables, batch.lengths, batch.query_starts, self.scale)
        return ops.linear(y.flatten(1), self.o_proj.value, addend=x)


class MLP(nn.Module):
    """Norm, gate and up, SwiGLU, down projection, sum with x."""

    def __init__(self, config: Config, dtype: torch.dtype, device: torch.device, weights: type[Weight] = Dense) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.gate_up_proj = Linear(
            2 * config.intermediate_size, config.hidden_size, dtype=dtype, device=device, weights=weights
        )
        self.down_proj = Linear(
            config.hidden_size, config.intermediate_size, dtype=dtype, device=device, weights=weights
        )

    def forward(self, x: Tensor, norm_weight: Tensor) -> Tensor:
        y = ops.norm_swiglu_linear(x, norm_weight, self.eps, self.gate_up_proj.value)
        return ops.linear(y, self.down_proj.value, addend=x)


class Linear(nn.Module):
    """The matrix of a linear layer, of any format of kernels/weights/, and its bias if asked for.

    Its parameters have the names that the format gives its tensors: ``weight`` for the dense one. ``value`` is what the
    ops take."""

    def __init__(
        self,
        rows: int,
        columns: int,
        bias: bool = False,
        *,
        dtype: torch.dtype,
        device: torch.device,
        weights: type[Weight] = Dense,
    ) -> None:
        super().__init__()
        self.format = weights
        try:
            value = weights.allocate(rows, columns, dtype, lambda shape, dtype: allocate(shape, dtype, device))
        except RequestError:
            raise
        except ValueError as error:  # sizes that the format does not have
            raise RequestError(f"weights is {weights.format!r}: {error}") from error
        for name, tensor in zip(weights.names, value.tensors, strict=True):
            setattr(self, name, nn.Parameter(tensor, requires_grad=False))
        if bias:
            self.bias = nn.Parameter(torch.empty(rows, dtype=dtype, device=device), requires_grad=False)

    @property
    def value(self) -> Weight:
        return self.format(*[self._parameters[name] for name in self.format.names])


class Norm(nn.Module):
    """The weight [H] of an RMSNorm."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(allocate((size,), dtype, device), requires_grad=False)


@torch.no_grad()
def initialise(model: Qwen2, seed: int) -> None:
    """Fills the parameters with random numbers in place: what a benchmark needs where no checkpoint is at hand."""
    generator = torch.Generator(model.model.norm.weight.device).manual_seed(seed)
    for module in model.modules():
        if isinstance(module, Norm):
            module.weight.fill_(1.0)
        elif isinstance(module, Linear):
            matrix = module.value.dequantise().normal_(0.0, 0.02, generator=generator)
            module.value.copy_(matrix)  # of a dense weight onto itself
            if hasattr(module, "bias"):
                module.bias.normal_(0.0, 0.02, generator=generator)
