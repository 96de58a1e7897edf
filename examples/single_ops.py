"""Uses single ops as functions of tensors, and compares each with the same formula in torch.

python examples/single_ops.py
"""

import torch
import torch.nn.functional as F

import qwenkern.kernels as qk

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16
tokens, hidden, heads, kv_heads, head_dim = 32, 2048, 16, 2, 128

x, residual = torch.randn(2, tokens, hidden, device=device, dtype=dtype)
weight = torch.rand(hidden, device=device, dtype=dtype)
normed, residual = qk.add_rms_norm(x, residual, weight, 1e-6)
print("add_rms_norm", (normed - F.rms_norm(residual, (hidden,), weight, 1e-6)).abs().max().item())

gate_up = torch.randn(tokens, 2 * hidden, device=device, dtype=dtype)
gate, up = gate_up.chunk(2, dim=-1)
print("swiglu", (qk.swiglu(gate_up) - F.silu(gate) * up).abs().max().item())

q = torch.randn(1, heads, tokens, head_dim, device=device, dtype=dtype)
k, v = torch.randn(2, 1, kv_heads, tokens, head_dim, device=device, dtype=dtype)
expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
print("attention", (qk.attention(q, k, v, head_dim**-0.5) - expected.transpose(1, 2)).abs().max().item())
