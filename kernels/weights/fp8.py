"""The fp8 format: codes in e4m3 (a sign, four exponent and three mantissa bits, as torch.float8_e4m3fn), and a float32
scale for each row.

    w[n, k] = scale[n] * code[n, k]
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..checks import check_tensor
from . import fp8_products
from .fp8_products import Fp8Arguments, Fp8Numbers
from .quantised import CHUNK, Quantised

LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448


class Fp8(Quantised):
    """``codes`` [N, K] and ``scales`` [N] are stored as integers with the bits of the floats, because the tests convert
    every float tensor to float64."""

    format = "fp8"
    names = ("codes", "scales", "like")
    triton_load = fp8_products.load
    triton_load_groups = fp8_products.load_groups
    triton_operand = fp8_products.operand
    triton_multiply = fp8_products.multiply
    triton_prefetch = fp8_products.prefetch
    triton_dequantise = fp8_products.dequantise
    __slots__ = names

    scales: Tensor

    @classmethod
    def allocate(
        cls, rows: int, columns: int, dtype: torch.dtype, empty: Callable[[tuple[int, ...], torch.dtype], Tensor]
    ) -> Fp8:
        return cls(empty((rows, columns), torch.uint8), empty((rows,), torch.int32), empty((0,), dtype))

    @classmethod
    def from_codes(cls, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Fp8:
        """A weight of codes [N, K] (float8_e4m3fn) and scales [N] (float32). ``dtype`` is that of the matrix. The
        weight shares the memory of both."""
        empty = torch.empty(0, dtype=dtype, device=codes.device)
        return cls(codes.view(torch.uint8), scales.view(torch.int32), empty)

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    def check(self, op: str, name: str, shape: tuple[int | str, int | str], like: Tensor | None = None) -> None:
        check_tensor(op, name, self.codes, shape, dtypes=(torch.uint8,))
        check_tensor(op, f"{name}.scales", self.scales, (len(self.codes),), dtypes=(torch.int32,), dense=True)
        self.check_dtype(op, name, like)

    def take(self, ids: Tensor) -> Tensor:
        return Fp8(self.codes[ids], self.scales[ids], self.like)._matrix()

    def copy_(self, matrix: Tensor) -> None:
        """Rounds every row to the nearest codes, with the scale that makes its largest value the largest code."""
        step = max(1, CHUNK // matrix.shape[1])
        for start in range(0, len(matrix), step):
            values = matrix[start : start + step].to(torch.float32)
            scales = values.abs().amax(1)
            scales /= torch.full_like(scales, LARGEST)  # a tensor: torch on a GPU multiplies by a number's reciprocal
            scales[scales == 0] = 1
            # a quotient may round to more than LARGEST, which would become NaN in float8_e4m3fn
            codes = (values / scales[:, None]).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
            self.codes[start : start + step] = codes.view(torch.uint8)
            self.scales[start : start + step] = scales.view(torch.int32)

    def triton_refuses(self) -> str | None:
        codes = self.codes
        if codes.shape[1] % 4 or codes.stride(0) % 4 or codes.data_ptr() % 4:
            return "weights of the format fp8 whose rows are not whole words of four codes"
        return None

    def triton_arguments(self) -> Fp8Arguments:
        return Fp8Arguments(self.codes, self.scales, self.codes.stride(0))

    def triton_numbers(self) -> Fp8Numbers:
        return Fp8Numbers()

    def _matrix(self) -> Tensor:
        """The values [N, K] in the dtype of the matrix."""
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        values = self.codes.view(torch.float8_e4m3fn).to(wide)
        return values.mul_(self.scales.view(torch.float32).to(wide)[:, None]).to(self.dtype)
