"""Gives the layers to Hugging Face's `kernels` library, which puts them into a model that asks for them.

python examples/kernels_layers.py
"""

from pathlib import Path

import kernels
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import qwenkern.kernels

config = Qwen2Config(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
model = Qwen2ForCausalLM(config).eval()
ids = torch.randint(256, (1, 64))
with torch.inference_mode():
    before = model(ids).logits

folder = Path(qwenkern.kernels.__file__).parent  # this folder is a repository of layers
device = model.device.type
names = {"RMSNorm": "RMSNorm", "rotary_pos_emb": "RotaryPosEmb"}  # transformers' name: ours
mapping = {name: {device: kernels.LocalLayerRepository(folder, layer_name=ours)} for name, ours in names.items()}
with kernels.use_kernel_mapping(mapping):
    kernels.kernelize(model, mode=kernels.Mode.INFERENCE, device=device)

with torch.inference_mode():
    print(f"largest difference of the logits: {(before - model(ids).logits).abs().max():.1e}")
print("the first norm runs:", model.model.layers[0].input_layernorm.forward.__module__)
