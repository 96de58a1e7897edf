"""Trains one feed-forward block whose norm and SwiGLU are ops with gradients.

python examples/training_step.py
"""

import torch
from torch import Tensor, nn

import qwenkern.kernels as qk


class Block(nn.Module):
    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.ones(hidden))
        self.gate_up = nn.Linear(hidden, 2 * intermediate, bias=False)
        self.down = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(qk.swiglu(self.gate_up(qk.rms_norm(x, self.norm, 1e-6))))


torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
block = Block(64, 128).to(device)
optimizer = torch.optim.AdamW(block.parameters(), lr=1e-2)
x = torch.randn(256, 64, device=device)
target = x.roll(1, dims=-1)
for step in range(50):
    loss = (block(x) - target).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0 or step == 49:
        print(f"step {step:2}  loss {loss.item():.4f}")
