"""The cosines and sines of rotary position embedding, for every position that a sequence has reached."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .config import Config

_FLOATS: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever torch's defaults are
_ELEMENTS = 1 << 19  # of a block of rows: 4,096 positions of a head of 128, some milliseconds


class RopeTable:
    """``cos_sin``: [rows, D] float32, cosines in the first half of a row, sines in the second.

    The memory of all rows is allocated at once, so that its address never changes. The rows are computed block by
    block, as sequences reach them. So a configuration with a context of millions costs no time and, on a CPU, no
    memory."""

    def __init__(self, config: Config, rows: int, device: torch.device) -> None:
        self._frequencies = inverse_frequencies(config)
        self._scale = config.rope_scaling.attention_scale if config.rope_scaling else 1.0
        self._block = max(64, _ELEMENTS // config.head_dim)
        self._computed = 0
        with torch.inference_mode(False):  # a tensor made in inference mode could not be written to outside
            size = min(rows, config.context_length), config.head_dim
            self.cos_sin = torch.empty(size, dtype=torch.float32, device=device)
        self.reach(1)

    def reach(self, rows: int) -> None:
        """Computes those of the first ``rows`` rows that the table does not have yet."""
        rows = min(rows, len(self.cos_sin))
        while self._computed < rows:
            end = min(self._computed + self._block, len(self.cos_sin))
            positions = torch.arange(self._computed, end, **_FLOATS)
            angles = positions[:, None] * self._frequencies
            block = torch.cat((angles.cos() * self._scale, angles.sin() * self._scale), dim=-1)
            with torch.no_grad():
                self.cos_sin[self._computed : end].copy_(block)
            self._computed = end


def inverse_frequencies(config: Config) -> Tensor:
    """Radians per position for each pair of dimensions: [D / 2] float32, with YaRN's blend if the config has it
    (Peng et al. 2023, arXiv:2309.00071, section 3.2)."""
    dim, theta, yarn = config.head_dim, config.rope_theta, config.rope_scaling
    wavelengths = theta ** (torch.arange(0, dim, 2, **_FLOATS) / dim)
    if yarn is None:
        return 1.0 / wavelengths

    def pair_that_turns(times: float) -> float:
        """The (fractional) index of the pair of dimensions that makes ``times`` turns within the original context."""
        positions_a_turn = yarn.original_max_position_embeddings / (times * 2 * math.pi)
        return dim * math.log(positions_a_turn) / (2 * math.log(theta))

    first, last = pair_that_turns(yarn.beta_fast), pair_that_turns(yarn.beta_slow)
    if yarn.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    ramp = (torch.arange(dim // 2, **_FLOATS) - first) / max(last - first, 1e-3)
    kept = 1 - ramp.clamp(0, 1)  # 1: kept, 0: stretched by the whole factor
    return (1 - kept) / (yarn.factor * wavelengths) + kept / wavelengths
