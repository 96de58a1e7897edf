"""Whole GGUF files of small models, with a tokenizer, written by the gguf library."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from support.toy_tokenizer import CHAT_TEMPLATE, byte_library

from qwenkern import Config
from qwenkern.checkpoint.packing import slots

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def llama_name(name: str) -> str:
    """llama.cpp's name of the tensor that has this name in Hugging Face's checkpoints."""
    stem, _, kind = name.rpartition(".")
    if not stem.startswith("model.layers."):
        return f"{_NAMES[stem]}.{kind}"
    _, _, layer, stem = stem.split(".", 3)
    return f"blk.{layer}.{_NAMES[stem]}.{kind}"


def write_gguf(
    path: Path,
    config: Config,
    kind: GGMLQuantizationType,
    others: Mapping[str, GGMLQuantizationType] | None = None,
    tokenizer: bool = True,
) -> None:
    """Writes a model of random blocks with small scales. ``others``: the types of some matrices, by Hugging Face's
    names."""
    writer = GGUFWriter(path, "qwen2")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    if tokenizer:
        _add_tokenizer(writer, config.vocab_size)
    random = np.random.default_rng(0)
    for name, slot in slots(config).items():
        stored = (others or {}).get(name, kind) if len(slot.shape) == 2 else GGMLQuantizationType.F32
        writer.add_tensor(llama_name(name), _values(random, slot.shape, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _values(random: np.random.Generator, shape: tuple[int, ...], kind: GGMLQuantizationType) -> np.ndarray:
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    size, bytes_of = GGML_QUANT_SIZES[kind]
    if kind == GGMLQuantizationType.F32:
        return random.normal(0, 0.05, shape).astype(np.float32)
    if kind in (GGMLQuantizationType.F16, GGMLQuantizationType.BF16):
        bits = random.normal(0, 0.05, shape).astype(np.float16).view(np.uint16)
        if kind == GGMLQuantizationType.BF16:
            bits = (random.normal(0, 0.05, shape).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        return bits.view(np.uint8)
    blocks = random.integers(0, 256, (*shape[:-1], shape[-1] // size, bytes_of), dtype=np.uint8)
    scale = np.frombuffer(np.float16(0.002).tobytes(), np.uint8)
    for place in _SCALES.get(kind.name, (0,)):
        blocks[..., place : place + 2] = scale
    return blocks.reshape(*shape[:-1], -1)


# The offsets of a block's scale and minimum
_SCALES = {
    "Q4_1": (0, 2),
    "Q5_1": (0, 2),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}


def _add_tokenizer(writer: GGUFWriter, vocab_size: int) -> None:
    vocab = byte_library().get_vocab(with_added_tokens=True)
    tokens = [*sorted(vocab, key=lambda token: vocab[token]), "ab"]  # the writer leaves out an empty list of merges
    types = [3 if token.startswith("<|") else 1 for token in tokens]
    unused = range(vocab_size - len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens + [f"[PAD{n}]" for n in unused])
    writer.add_token_types(types + [5 for _ in unused])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(vocab["<|im_end|>"])
    writer.add_chat_template(CHAT_TEMPLATE)
