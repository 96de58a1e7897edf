"""Asynchronous copies and products that a warp has begun and not yet waited for, in groups."""

from __future__ import annotations

from dataclasses import dataclass, field

from .parse import Register
from .values import Array


@dataclass
class Sums:
    """The matrix D of products, before it is written to its registers."""

    registers: tuple[Register, ...]
    shape: str
    value: Array  # [16, N] float32
    defined: bool
    products: int = 0  # under way


@dataclass
class Product:
    read: list[Array]  # addresses in shared memory
    registers: list[tuple[Register, Array | None]]  # the registers of A, and their contents
    sums: Sums


@dataclass
class UnderWay:
    """``copies`` and ``products`` are in no group yet."""

    copies: list[tuple[Array, Array]] = field(default_factory=list)  # addresses, data
    copy_groups: list[list[tuple[Array, Array]]] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    product_groups: list[list[Product]] = field(default_factory=list)
    sums: dict[int, Sums] = field(default_factory=dict)  # by register
    fenced: dict[int, Array | None] | None = None  # the contents of products' registers at the last wgmma.fence
