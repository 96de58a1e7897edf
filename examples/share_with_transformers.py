"""Runs a loaded model of transformers here, on the same memory: both models work, and share every weight.

python examples/share_with_transformers.py
"""

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from qwenkern import Model

config = Qwen2Config(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
theirs = Qwen2ForCausalLM(config).eval()  # or AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-0.5B-Instruct")
ours = Model.from_transformers(theirs)  # and its tokenizer, for prompts that are text

ids = list(range(1, 20))
expected = theirs.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :].tolist()
print("same tokens:", ours.generate(ids, max_tokens=8, ignore_eos=True).token_ids == expected)

before = ours.forward(ids)
with torch.no_grad():
    theirs.model.layers[0].mlp.down_proj.weight.mul_(2)  # what training would do
print("a change to one is a change to both:", not torch.equal(ours.forward(ids), before))
