"""Puts the kernels into a model of transformers, in place, and takes them out again.

python examples/patch_transformers.py
"""

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from qwenkern.integrations.transformers import apply_qwenkern, revert

config = Qwen2Config(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
model = Qwen2ForCausalLM(config).eval().to(torch.bfloat16)  # or AutoModelForCausalLM.from_pretrained(...)
ids = torch.randint(256, (1, 256))

with torch.inference_mode():
    before = model(ids).logits
    apply_qwenkern(model)  # norms, rotary embedding, SwiGLU, attention; each is a switch, e.g. attention=False
    after = model(ids).logits
print("patched:", type(model.model.norm) is not Qwen2RMSNorm)
print(f"largest difference of the logits: {(before - after).abs().max():.1e}")
print(model.generate(ids, max_new_tokens=4, do_sample=False)[0, -4:].tolist())
revert(model)  # exactly what was there
print("reverted:", type(model.model.norm) is Qwen2RMSNorm)
