"""The other engines of end_to_end.py, on the weights of a qwenkern Model."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qwenkern import Model
from qwenkern.benchmarks.models import llama_cpp as programs
from qwenkern.checkpoint.packing import unpacked

Generate = Callable[[list[list[int]], int], Any]  # takes prompts, and the number of tokens to add to each


@dataclass(frozen=True)
class Reading:
    """One measurement of an engine."""

    first: float  # seconds until every prompt's first token
    rate: float  # tokens per second after that, of all sequences together


@dataclass(frozen=True)
class Engine:
    """An engine, and the facts from which its share of the roofline is computed."""

    read: Callable[[list[list[int]], int], Reading]  # takes prompts of equal length, and the tokens after the first
    weights: int  # bytes of weights that a decode step reads
    in_16_bits: bool = True  # False: the multiply-add peak does not limit its products
    facts: dict[str, Any] = field(default_factory=dict)


def timed(generate: Generate) -> Callable[[list[list[int]], int], Reading]:
    """Readings of an engine. The time of a decode step is (time of n + 1 tokens - time of 1 token) / n."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None

    def seconds(prompts: list[list[int]], count: int) -> float:
        synchronize()
        started = time.perf_counter()
        generate(prompts, count)
        synchronize()
        return time.perf_counter() - started

    def read(prompts: list[list[int]], new: int) -> Reading:
        first, whole = seconds(prompts, 1), seconds(prompts, new + 1)
        return Reading(first, len(prompts) * new / max(whole - first, 1e-9))

    return read


def qwenkern(model: Model) -> Engine:
    def generate(prompts: list[list[int]], count: int) -> Any:
        return model.generate(prompts, max_tokens=count, temperature=0, ignore_eos=True)

    return Engine(timed(generate), step_weights(model), model.dtype == torch.bfloat16)


def step_weights(model: Model) -> int:
    """Bytes of weights that a decode step reads: all weights, except an embedding that is not also the head."""
    module = model.module
    embedding = 0 if model.config.tie_word_embeddings else module.model.embed_tokens.value.nbytes
    return sum(each.nbytes for each in module.parameters()) - embedding


def patched(peer: Any) -> Any:
    """A transformers model with our kernels."""
    from qwenkern.integrations.transformers import apply_qwenkern

    return apply_qwenkern(peer)


def with_liger(peer: Any) -> Any:
    """A transformers model with Liger's norm and SwiGLU. Liger's rotary embedding would change every model here."""
    from liger_kernel.transformers import apply_liger_kernel_to_qwen2

    apply_liger_kernel_to_qwen2(model=peer, rope=False, rms_norm=True, swiglu=True)
    return peer


def transformers(model: Model, static: bool = False, change: Callable[[Any], Any] = lambda peer: peer) -> Engine:
    """transformers on our weights: eager with its dynamic cache, or compiled with a static cache. ``change`` is applied
    to the model first."""
    from transformers import CompileConfig

    peer = change(transformers_model(model))
    device = next(model.module.parameters()).device
    compiled: dict[str, Any] = {"cache_implementation": "static"}
    if device.type == "cpu":  # on a CPU transformers compiles only on request
        compiled["compile_config"] = CompileConfig(mode="default")
        compiled["compile_config"]._compile_all_devices = True

    @torch.inference_mode()
    def generate(prompts: list[list[int]], count: int) -> Any:
        ids = torch.tensor(prompts, device=device)
        settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        settings |= compiled if static else {}
        return peer.generate(ids, attention_mask=torch.ones_like(ids), **settings)

    return Engine(timed(generate), step_weights(model))


def llama_cpp(file: Path, threads: int) -> Engine:
    """llama.cpp's programs on a GGUF file. Raises FileNotFoundError if they are missing, and RuntimeError if they
    cannot read the file."""
    import gguf

    found = programs.Programs(file, threads)

    def read(prompts: list[list[int]], new: int) -> Reading:
        prefill, decode = found.seconds(len(prompts), len(prompts[0]), new)
        return Reading(prefill, len(prompts) * new / decode)

    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    if "output.weight" in tensors:  # otherwise the embedding is also the head
        del tensors["token_embd.weight"]
    weights = sum(int(tensor.n_bytes) for tensor in tensors.values())
    types = {tensor.tensor_type.name for tensor in tensors.values()}
    return Engine(read, weights, types <= {"BF16", "F16", "F32"}, found.facts)


def transformers_model(model: Model) -> Any:
    """transformers' Qwen2 whose parameters are views of our packed ones, not copies."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = model.config
    names = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "max_position_embeddings rms_norm_eps tie_word_embeddings"
    )
    fields: dict[str, Any] = {name: getattr(config, name) for name in names.split()}
    fields["attn_implementation"] = "sdpa"
    fields["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta}
    with torch.device("meta"):
        peer = Qwen2ForCausalLM(Qwen2Config(**fields))
    weights = dict(unpacked(model.module, config))
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    peer.load_state_dict(weights, strict=True, assign=True)
    peer.model.rotary_emb = type(peer.model.rotary_emb)(peer.config).to(model.device)
    return peer.eval()


def write_gguf(model: Model, file: Path) -> None:
    """A model's weights as a GGUF file without a vocabulary: matrices in bfloat16, vectors in float32."""
    import gguf

    config = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    writer = gguf.GGUFWriter(file, "qwen2")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    for long_name, tensor in unpacked(model.module, config):
        name = names.get_name(long_name, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ValueError(f"GGUF has no name for {long_name}")
        if tensor.dim() == 1:
            writer.add_tensor(name, tensor.float().cpu().numpy())
        else:
            rows = tensor.bfloat16().cpu().contiguous().view(torch.uint8).numpy()
            writer.add_tensor(name, rows, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
