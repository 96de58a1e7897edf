"""Qwen2 as a module graph of fused ops, written once for every device and every number of tokens.

``x`` is the residual stream. The first op of a sub-layer normalises x and multiplies it by a matrix. The last op is a
projection that adds x to its product. Parameters have the checkpoint's names, except that q, k, v and gate, up are
packed: the rows of one follow the rows of the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from . import kernels as ops
from .allocation import allocate
from .cache import Batch, PagedCache
from .config import Config
from .kernels import Pages, Weight
from .kernels.weights import Dense, as_weight


class Qwen2(nn.Module):
    """The language model: tokens in, logits out."""

    def __init__(self, config: Config, dtype: torch.dtype, device: torch.device, allocated: bool = True) -> None:
        """Allocates the parameters and leaves their values undefined: load or initialise them next.

        ``dtype`` is that of x. Matrices are dense. With ``allocated=False`` they have no memory yet: the caller sets
        the ``value`` of each Linear, in any format."""
        super().__init__()
        self.config = config
        self.model = Decoder(config, dtype, device)
        self.lm_head = (
            self.model.embed_tokens
            if config.tie_word_embeddings
            else Linear(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
        )
        if allocated:
            for linear in self.linears().values():
                linear.allocate()

    def linears(self) -> dict[str, Linear]:
        """All linear layers by name, the embedding included. A tied output layer is the embedding, and counts once."""
        return {name: module for name, module in self.named_modules() if isinstance(module, Linear)}

    def forward(self, batch: Batch, cache: PagedCache, rows: Tensor | None = None) -> Tensor:
        """Runs the T tokens of a batch and writes their keys and values into the cache.

        Returns float32 logits [T, vocabulary], or those of ``rows`` only (indices into the batch's tokens)."""
        x = self.model(batch, cache)
        x = x if rows is None else x[rows]
        # A chunk in the middle of a prompt has no rows, and the output weights are not read.
        return self.logits(x) if len(x) else x.new_empty(0, self.config.vocab_size, dtype=torch.float32)

    def logits(self, x: Tensor) -> Tensor:
        """The logits for the residual stream [T, K] after the last layer: float32 [T, vocabulary]."""
        return ops.lm_head(x, self.model.norm.weight, self.config.rms_norm_eps, self.lm_head.value)

    def greedy(self, batch: Batch, cache: PagedCache) -> tuple[Tensor, Tensor]:
        """As `forward`, but returns only the largest logit after each token, [T] float32, and its token id, [T]: the
        lowest id of equal logits. The value is NaN or +inf if one of the logits is."""
        x = self.model(batch, cache)
        norm_weight, eps = self.model.norm.weight, self.config.rms_norm_eps
        values, ids = ops.lm_head_top_k(x, norm_weight, eps, self.lm_head.value, 1)
        return values[:, 0], ids[:, 0]

    @property
    def is_quantised(self) -> bool:
        """Whether any matrix is quantised."""
        return any(not isinstance(weight, Dense) for weight in self.weights())

    def weights(self) -> Iterator[Weight]:
        """The matrices of all linear layers, the embedding included."""
        return (each.value for each in self.modules() if isinstance(each, Linear))

    def fingerprint(self) -> str:
        """A digest of the configuration and of some values of each weight. It differs between models."""
        digest = hashlib.sha256(repr(replace(self.config, source="")).encode())
        for name, parameter in self.named_parameters():
            values = parameter.detach().flatten()
            some = values[:: max(1, len(values) // 64)][:64].contiguous()
            digest.update(f"{name} {list(parameter.shape)} {parameter.dtype}".encode())
            digest.update(some.view(torch.uint8).cpu().numpy().tobytes())
        return digest.hexdigest()

    def k_biases(self) -> list[Tensor]:
        """The bias of k in each layer, before rotary embedding: [Hkv, D]."""
        sizes = [self.config.q_size, self.config.kv_size, self.config.kv_size]
        layers = [cast(DecoderLayer, layer).self_attn.qkv_proj.bias for layer in self.model.layers]
        return [bias.detach().split(sizes)[1].unflatten(0, (-1, self.config.head_dim)) for bias in layers]

    def untie(self, head: Weight) -> None:
        """Gives the output layer, which shared the embedding's weight, a weight of its own."""
        norm = self.model.norm.weight
        self.config = replace(self.config, tie_word_embeddings=False)
        self.lm_head = Linear(*head.shape, dtype=norm.dtype, device=norm.device)
        self.lm_head.value = head


class Decoder(nn.Module):
    """The stack of layers, between embedding and last norm."""

    def __init__(self, config: Config, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.embed_tokens = Linear(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
        self.layers = nn.ModuleList(DecoderLayer(config, dtype, device) for _ in range(config.num_hidden_layers))
        self.norm = Norm(config.hidden_size, dtype, device)

    def forward(self, batch: Batch, cache: PagedCache) -> Tensor:
        """The residual stream [T, K] after the last layer."""
        x: Tensor = ops.embedding(batch.ids, self.embed_tokens.value)
        for layer, pages in zip(self.layers, cache.pages, strict=True):
            x = layer(x, batch, pages, cache.rope.cos_sin)
        return x


class DecoderLayer(nn.Module):
    def __init__(self, config: Config, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.input_layernorm = Norm(config.hidden_size, dtype, device)
        self.self_attn = Attention(config, dtype, device)
        self.post_attention_layernorm = Norm(config.hidden_size, dtype, device)
        self.mlp = MLP(config, dtype, device)

    def forward(self, x: Tensor, batch: Batch, pages: Pages, cos_sin: Tensor) -> Tensor:
        x = self.self_attn(x, self.input_layernorm.weight, batch, pages, cos_sin)
        return self.mlp(x, self.post_attention_layernorm.weight)


class Attention(nn.Module):
    """Norm, q, k and v, rotary embedding, cache, grouped-query attention, output projection, sum with x."""

    def __init__(self, config: Config, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.scale = config.head_dim**-0.5
        self.qkv_proj = Linear(config.qkv_size, config.hidden_size, bias=True, dtype=dtype, device=device)
        self.o_proj = Linear(config.hidden_size, config.q_size, dtype=dtype, device=device)

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

    def __init__(self, config: Config, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.gate_up_proj = Linear(2 * config.intermediate_size, config.hidden_size, dtype=dtype, device=device)
        self.down_proj = Linear(config.hidden_size, config.intermediate_size, dtype=dtype, device=device)

    def forward(self, x: Tensor, norm_weight: Tensor) -> Tensor:
        y = ops.norm_swiglu_linear(x, norm_weight, self.eps, self.gate_up_proj.value)
        return ops.linear(y, self.down_proj.value, addend=x)


class Linear(nn.Module):
    """The matrix of a linear layer, in any format of kernels/weights/, and its bias if it has one.

    ``value`` is the weight that the ops take. Its tensors are parameters with the names that the format gives them,
    such as ``weight`` for a dense matrix. A new layer has no weight until ``allocate`` is called or ``value`` is set.
    """

    def __init__(
        self, rows: int, columns: int, bias: bool = False, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.rows, self.columns, self.dtype, self.device = rows, columns, dtype, device
        self.format: str = Dense.format
        self.names: tuple[str, ...] = Dense.names
        if bias:
            self.bias = nn.Parameter(torch.empty(rows, dtype=dtype, device=device), requires_grad=False)

    def allocate(self, form: type[Weight] = Dense) -> Weight:
        """Allocates a weight with undefined values, and returns it. Raises ValueError for sizes that the format does
        not support."""
        self.value = form.allocate(
            self.rows, self.columns, self.dtype, lambda shape, dtype: allocate(shape, dtype, self.device)
        )
        return self.value

    @property
    def is_allocated(self) -> bool:
        return all(name in self._parameters for name in self.names)

    @property
    def value(self) -> Weight:
        weight: Weight = as_weight([self._parameters[name] for name in self.names], self.format)
        return weight

    @value.setter
    def value(self, weight: Weight) -> None:
        for name in self.names:
            self._parameters.pop(name, None)
        self.format, self.names = weight.format, weight.names
        for name, tensor in zip(weight.names, weight.tensors, strict=True):
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))


class Norm(nn.Module):
    """The weight [H] of an RMSNorm."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(allocate((size,), dtype, device), requires_grad=False)


@torch.no_grad()
def initialise(
    model: Qwen2, seed: int, quantised: Callable[[str, Tensor, torch.dtype], Weight | None] | None = None
) -> None:
    """Fills the parameters with random numbers, such as for a benchmark without a checkpoint.

    ``quantised`` converts the matrix of the linear layer of this name to a weight (conversion.py), or returns None if
    it stays dense. Without ``quantised``, all matrices are dense."""
    generator = torch.Generator(model.model.norm.weight.device).manual_seed(seed)
    for name, module in model.named_modules():
        if isinstance(module, Norm):
            module.weight.fill_(1.0)
        elif isinstance(module, Linear):
            matrix = module.allocate().dequantise().normal_(0.0, 0.02, generator=generator)
            if quantised and (weight := quantised(name, matrix, module.dtype)):
                module.value = weight
            if hasattr(module, "bias"):
                module.bias.normal_(0.0, 0.02, generator=generator)
