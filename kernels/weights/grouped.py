"""The layout of quantised weights: integer codes, with a scale for each group of codes along K.

    w[n, k] = scale[n, g] * (code[n, k] - zero) + offset[n, g]          g = k // (values of a group)

    scale    `scales`, or in formats with sub-scales `scales` (one for SUPER values) times `sub_scales`
    zero     a number of the format, or `zeros`
    offset   nothing, or `minima`, or in formats with sub-scales -(`minima` * `sub_minima`)

Codes are unsigned. They lie in tiles of 16 rows and 32 values of k; the tiles of the same 16 rows follow each other in
memory. The 32 values of a row are eight words of four bytes: byte t of word b is value k = 16 (b // 4) + 4 t + b % 4.

    codes, up to 6 bits   word (j, row), j < 4: low halves of its bytes are word j, high halves word j + 4; low 4 bits
    codes, 8 bits         word (j, row), j < 8: word j
    high, 5 bits          word (0, row): bit b of byte t is the fifth bit of byte t of word b
    high, 6 bits          word (h, row), h < 2: bits 2 f and 2 f + 1 of byte t are the upper bits of byte t of word
                          4 h + f

A group is a multiple of 16 values, so a word never holds values of two groups.

A processor multiplies 16 rows by four values of x at a time: a word of each row by one word of x in the same order. A
GPU finds the codes of a nibble at the same place in every word, so it unpacks whole registers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..checks import check_tensor
from . import group_products, group_rows
from .group_products import GroupArguments, GroupNumbers
from .quantised import CHUNK, Quantised
from .rounding import Rounded, nearest
from .tiles import DEPTH, ROWS, pack, unpack

SUPER = 256  # values that share a scale of sub-scales
GROUPS = (128, 64, 32)  # values of a group, if the format does not fix their number: the first that divides K
_IN_CACHE = 1 << 18  # values that a CPU rounds at a time: 1 MiB as float32 stays in the cache between the passes
_BITS = {torch.int16: torch.float16, torch.int32: torch.float32}  # dtype of stored bits -> dtype of the floats


class Grouped(Quantised, is_format=False):
    """Codes of ``bits`` bits. A subclass is a format.

    ``group`` is the number of values of a group; if it is None, the shape of ``zeros`` gives the number. ``zero`` is
    subtracted from every code; if it is None, ``zeros`` has a zero point for each group. ``super_scales`` says that
    scales (and minima) are products of a float16 and a small integer."""

    bits: ClassVar[int]
    group: ClassVar[int | None] = 32
    zero: ClassVar[int | None] = 0
    has_minima: ClassVar[bool] = False
    super_scales: ClassVar[bool] = False
    signed_sub_scales: ClassVar[bool] = False
    levels: ClassVar[int]  # the number of codes in use; 2 ** bits unless the format says otherwise

    row_tile = ROWS
    triton_load = group_products.load
    triton_load_groups = group_products.load_groups
    triton_operand = group_products.operand
    triton_multiply = group_products.multiply
    triton_prefetch = group_products.prefetch
    triton_dequantise = group_rows.dequantise

    scales: Tensor
    high: Tensor | None = None
    minima: Tensor | None = None
    sub_scales: Tensor | None = None
    sub_minima: Tensor | None = None
    zeros: Tensor | None = None

    def __init_subclass__(cls, **keywords: Any) -> None:
        has = {
            "codes": True,
            "high": cls.bits in (5, 6),
            "scales": True,
            "minima": cls.has_minima,
            "sub_scales": cls.super_scales,
            "sub_minima": cls.super_scales and cls.has_minima,
            "zeros": cls.zero is None,
            "like": True,
        }
        cls.names = tuple(name for name, present in has.items() if present)
        cls.levels = vars(cls).get("levels", 1 << cls.bits)
        super().__init_subclass__(**keywords)

    @classmethod
    def shapes(cls, rows: int, columns: int, group: int | None = None) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor but ``like``. ``group`` is for formats that do not fix it; the default is the first
        of GROUPS that divides the columns. Raises ValueError for a size that the format does not have."""
        group = cls.group or group or next((each for each in GROUPS if columns % each == 0), DEPTH)
        multiple = SUPER if cls.super_scales else max(group, DEPTH)
        if rows % ROWS or columns % multiple or not rows or not columns:
            raise ValueError(
                f"the format {cls.format} has matrices whose rows are a multiple of {ROWS} and whose columns are a "
                f"multiple of {multiple}, not [{rows}, {columns}]"
            )
        tile_rows, tiles = rows // ROWS, columns // DEPTH
        of_group = (tile_rows, columns // group, ROWS)
        of_scales = (tile_rows, columns // SUPER, ROWS) if cls.super_scales else of_group
        shapes = {
            "codes": (tile_rows, tiles, 8 if cls.bits == 8 else 4, ROWS),
            "high": (tile_rows, tiles, cls.bits - 4, ROWS),
            "scales": of_scales,
            "minima": of_scales,
            "sub_scales": of_group,
            "sub_minima": of_group,
            "zeros": of_group,
        }
        return {name: shapes[name] for name in cls.names[:-1]}

    @classmethod
    def allocate(
        cls,
        rows: int,
        columns: int,
        dtype: torch.dtype,
        empty: Callable[[tuple[int, ...], torch.dtype], Tensor],
        group: int | None = None,
    ) -> Grouped:
        shapes = cls.shapes(rows, columns, group)
        return cls(*[empty(shape, cls._dtype(name)) for name, shape in shapes.items()], empty((0,), dtype))

    @classmethod
    def _dtype(cls, name: str) -> torch.dtype:
        if name in ("scales", "minima"):
            return torch.int16
        if name == "sub_scales" and cls.signed_sub_scales:
            return torch.int8
        return torch.int32 if name in ("codes", "high") else torch.uint8

    @classmethod
    def from_codes(cls, codes: Tensor, dtype: torch.dtype, **of_groups: Tensor) -> Grouped:
        """A weight of codes [N, K] (uint8) and the format's other tensors, row by row: ``scales`` and ``minima``
        [N, groups] in float16 (scales also in float32); ``sub_scales``, ``sub_minima`` and ``zeros`` [N, groups] in
        small integers. ``dtype`` is that of the matrix.

        Raises ValueError for a size that the format does not have."""
        rows, columns = codes.shape
        group = None if cls.zero is not None else columns // of_groups["zeros"].shape[1]
        shapes = cls.shapes(rows, columns, group)
        packed, high = pack(codes, cls.bits)
        tensors = {"codes": packed} if high is None else {"codes": packed, "high": high}
        for name, value in of_groups.items():
            if value.dtype.is_floating_point:
                value = value.view(torch.int16 if value.dtype == torch.float16 else torch.int32)
            else:
                value = value.to(cls._dtype(name))
            tensors[name] = value.view(-1, ROWS, value.shape[1]).transpose(1, 2).contiguous()
        for name, shape in shapes.items():
            if tensors[name].shape != shape:
                raise ValueError(f"{cls.format}: {name} has shape {list(tensors[name].shape)}; expected {list(shape)}")
        return cls(*[tensors[name] for name in shapes], torch.empty(0, dtype=dtype, device=codes.device))

    @property
    def shape(self) -> torch.Size:
        tile_rows, tiles = self.codes.shape[:2]
        return torch.Size((ROWS * tile_rows, DEPTH * tiles))

    @property
    def values_of_group(self) -> int:
        """The number of values of a group."""
        if self.group is not None:
            return self.group
        assert self.zeros is not None
        return self.shape[1] // self.zeros.shape[1]

    def check(self, op: str, name: str, shape: tuple[int | str, int | str], like: Tensor | None = None) -> None:
        if not isinstance(self.codes, Tensor) or self.codes.dim() != 4:
            raise ValueError(f"{op}: {name}.codes must be a tensor [rows / 16, K / 32, words, 16]")
        for want, have in zip(shape, self.shape, strict=True):
            if want != have and not (isinstance(want, str) and have):
                wanted = ", ".join(map(str, shape))
                raise ValueError(f"{op}: {name} must have shape [{wanted}], and has {list(self.shape)}")
        zeros = self.zeros
        group = None if self.zero is not None or zeros is None or not zeros.shape[1:2] else _group(self.shape[1], zeros)
        try:
            shapes = self.shapes(self.shape[0], self.shape[1], group)
        except ValueError as error:
            raise ValueError(f"{op}: {name}: {error}") from None
        for each, sizes in shapes.items():
            dtypes = tuple(_BITS) if each == "scales" and not self.super_scales else (self._dtype(each),)
            check_tensor(op, f"{name}.{each}", getattr(self, each), sizes, dtypes=dtypes, dense=True)
        self.check_dtype(op, name, like)

    def take(self, ids: Tensor) -> Tensor:
        tiles, rows = ids // ROWS, ids % ROWS
        parts = [each[tiles, ..., rows].unsqueeze(-1) for each in self.tensors[:-1]]
        return type(self)(*parts, self.like)._matrix()

    def copy_(self, matrix: Tensor) -> None:
        """Rounds the matrix to the nearest codes, with the scales of the least squared error (rounding.py)."""
        rows, columns = matrix.shape
        at_once = _IN_CACHE if matrix.device.type == "cpu" else CHUNK
        step = ROWS * max(1, at_once // (ROWS * columns))
        for start in range(0, rows, step):
            part = matrix[start : start + step]
            made: Rounded = nearest(part.to(torch.float32), type(self), self.values_of_group)
            mine = self.rows(start, start + len(part))
            scales = made.of_groups["scales"].to(_BITS[self.scales.dtype])
            other = self.from_codes(made.codes, self.dtype, **made.of_groups | {"scales": scales})
            for to, value in zip(mine.tensors[:-1], other.tensors[:-1], strict=True):
                to.copy_(value)

    def triton_arguments(self) -> GroupArguments:
        groups = self.scales if self.sub_scales is None else self.sub_scales
        return GroupArguments(
            self.codes, self.high, self.scales, self.minima, self.sub_scales, self.sub_minima, self.zeros,
            None if self.high is None else _places(self.device), self.codes.shape[1], groups.shape[1],
        )  # fmt: skip

    def triton_numbers(self) -> GroupNumbers:
        group = self.values_of_group
        # Float32 products are added one after another, so the error grows with their number.
        most = 16 if self.dtype == torch.float32 else group
        return GroupNumbers(
            bits=self.bits,
            group=group,
            step=min(group & -group, most),
            has_offset=self.has_minima,
            has_sub_scales=self.super_scales,
            has_zeros=self.zero is None,
            zero=self.zero or 0,
            middle=1 << self.bits - 1 if self.zero is None else self.zero,
        )

    def unpacked(self) -> Tensor:
        """The codes [N, K], uint8."""
        return unpack(self.codes, self.high)

    def of_groups(self) -> dict[str, Tensor]:
        """The keyword arguments of ``from_codes``, row by row."""
        parts = {name: getattr(self, name) for name in self.names if name not in ("codes", "high", "like")}
        floats = {name: part.view(_BITS[part.dtype]) if part.dtype in _BITS else part for name, part in parts.items()}
        return {name: part.transpose(1, 2).flatten(0, 1) for name, part in floats.items()}

    def is_finite(self) -> bool:
        """Whether all scales and minima are finite numbers. Then all values are finite."""
        floats = [part for part in (self.scales, self.minima) if part is not None]
        return all(bool(part.view(_BITS[part.dtype]).isfinite().all()) for part in floats)

    def _matrix(self) -> Tensor:
        """The values [N, K] in the dtype of the matrix. With sub-scales every product is exact in float32."""
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        parts = {name: part.to(wide) for name, part in self.of_groups().items()}
        codes = self.unpacked()
        groups = parts.get("sub_scales", parts["scales"]).shape[1]
        scale, offset = parts["scales"], parts.get("minima")
        if self.super_scales:
            each = groups // scale.shape[1]
            scale = scale.repeat_interleave(each, dim=1) * parts["sub_scales"]
            if offset is not None:
                offset = offset.repeat_interleave(each, dim=1).mul_(parts["sub_minima"]).neg_()
        values = codes.view(len(codes), groups, -1).to(wide)
        values -= parts["zeros"][..., None] if self.zero is None else self.zero
        values *= scale[..., None]
        if offset is not None:
            values += offset[..., None]
        return values.view(codes.shape).to(self.dtype)


@functools.cache
def _places(device: torch.device) -> Tensor:
    return torch.arange(4, dtype=torch.int32, device=device)


def _group(columns: int, zeros: Tensor) -> int:
    return columns // max(1, zeros.shape[1])
