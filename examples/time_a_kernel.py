"""Times one op beside torch's, in turns and on inputs that no cache holds, and relates it to the bytes it moves.

python examples/time_a_kernel.py
"""

import functools

import torch
import torch.nn.functional as F

import qwenkern.kernels as qk
from qwenkern.benchmarks.ops.timing import Spread, side_by_side

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
tokens, hidden = 512, 2048
weight = torch.rand(hidden, device=device, dtype=torch.bfloat16)
inputs = [torch.randn(tokens, hidden, device=device, dtype=torch.bfloat16) for _ in range(32)]
ours = [functools.partial(qk.rms_norm, x, weight, 1e-6) for x in inputs]
theirs = [functools.partial(F.rms_norm, x, (hidden,), weight, 1e-6) for x in inputs]

readings = side_by_side({"qwenkern": ours, "torch": theirs}, device, seconds=1.0)
moved = 2 * tokens * hidden * 2 + hidden * 2  # bytes: x in, the result out, the weight
for name, seconds in readings.items():
    time = Spread.of(seconds)
    spread = f"{1e6 * time.p50:8.1f} us ({1e6 * time.p20:.1f} to {1e6 * time.p80:.1f})"
    print(f"{name:9} {spread}, {moved / time.p50 / 1e9:.1f} GB/s")
ratios = Spread.of([b / a for a, b in zip(readings["qwenkern"], readings["torch"], strict=True)])
print(f"speed-up over torch: {ratios.p50:.2f} ({ratios.p20:.2f} to {ratios.p80:.2f})")
