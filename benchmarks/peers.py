"""Other engines on the weights that a qwenkern Model holds: what end_to_end.py measures ours beside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwenkern import Model

Generate = Callable[[list[list[int]], int], Any]  # prompts, and how many tokens to add to each


def qwenkern(model: Model) -> Generate:
    return lambda prompts, count: model.generate(prompts, max_tokens=count, temperature=0, ignore_eos=True)


def patched(peer: Any) -> Any:
    """A transformers model with our pieces."""
    from qwenkern.integrations.transformers import apply_qwenkern

    return apply_qwenkern(peer)


def with_liger(peer: Any) -> Any:
    """A transformers model with Liger's norm and SwiGLU; its rotary embedding would change every model here."""
    from liger_kernel.transformers import apply_liger_kernel_to_qwen2

    apply_liger_kernel_to_qwen2(model=peer, rope=False, rms_norm=True, swiglu=True)
    return peer


def transformers(model: Model, static: bool = False, change: Callable[[Any], Any] = lambda peer: peer) -> Generate:
    """transformers over the weights of ours: eager with its dynamic cache, or compiled with a static one; ``change`` is
    what is done to it first."""
    peer = change(transformers_model(model))
    device = next(model.module.parameters()).device

    @torch.inference_mode()
    def generate(prompts: list[list[int]], count: int) -> Any:
        ids = torch.tensor(prompts, device=device)
        settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        settings |= {"cache_implementation": "static"} if static else {}
        return peer.generate(ids, attention_mask=torch.ones_like(ids), **settings)

    return generate


def llama_cpp(file: Path, room: int) -> Generate:
    """llama.cpp through its Python package, on a GGUF file: one sequence after the other."""
    from llama_cpp import Llama

    threads = torch.get_num_threads()
    engine = Llama(str(file), n_ctx=room, n_threads=threads, n_threads_batch=threads, verbose=False)

    def generate(prompts: list[list[int]], count: int) -> None:
        for prompt in prompts:
            tokens = engine.generate(prompt, temp=0.0, reset=True)
            for _ in range(count):
                next(tokens)
            engine.reset()

    return generate


def transformers_model(model: Model) -> Any:
    """transformers' Qwen2 whose parameters are views of our packed ones, not copies."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = model.config
    names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
    with torch.device("meta"):
        peer = Qwen2ForCausalLM(
            Qwen2Config(
                **{name: getattr(config, name) for name in names.split()},
                max_position_embeddings=config.max_position_embeddings,
                rms_norm_eps=config.rms_norm_eps,
                tie_word_embeddings=config.tie_word_embeddings,
                rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            )
        )
    weights = unpacked(model)
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    peer.load_state_dict(weights, strict=True, assign=True)
    peer.model.rotary_emb = type(peer.model.rotary_emb)(peer.config).to(model.module.cos_sin.device)
    return peer.eval()


def unpacked(model: Model) -> dict[str, Tensor]:
    """Views of a model's weights under their names at Hugging Face."""
    config, weights = model.config, {}
    for name, tensor in model.module.state_dict().items():
        if "qkv_proj" in name:
            sizes = [config.q_size, config.kv_size, config.kv_size]
            weights |= {name.replace("qkv", part): rows for part, rows in zip("qkv", tensor.split(sizes), strict=True)}
        elif "gate_up_proj" in name:
            parts = zip(("gate", "up"), tensor.chunk(2), strict=True)
            weights |= {name.replace("gate_up", part): rows for part, rows in parts}
        elif not (config.tie_word_embeddings and name == "lm_head.weight"):
            weights[name] = tensor
    return weights


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
    for long_name, tensor in unpacked(model).items():
        name = names.get_name(long_name, try_suffixes=(".weight", ".bias"))
        if tensor.dim() == 1:
            writer.add_tensor(name, tensor.float().cpu().numpy())
        else:
            rows = tensor.bfloat16().cpu().contiguous().view(torch.uint8).numpy()
            writer.add_tensor(name, rows, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
