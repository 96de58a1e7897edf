"""What a warp has begun and not yet waited for: asynchronous copies and products, in groups."""

from __future__ import annotations

from dataclasses import dataclass, field

from .parse import Register
from .values import Array


@dataclass
class Sums:
    """D of products while it is not in its registers."""

    registers: tuple[Register, ...]
    shape: str
    value: Array  # [16, N] float32
    defined: bool
    products: int = 0  # under way


@dataclass
class Product:
    read: list[Array]  # places of shared memory
    registers: list[tuple[Register, Array | None]]  # of A, and what was in them
    sums: Sums


@dataclass
class UnderWay:
    """``copies`` and ``products`` are in no group yet."""

    copies: list[tuple[Array, Array]] = field(default_factory=list)  # addresses, data
    copy_groups: list[list[tuple[Array, Array]]] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    product_groups: list[list[Product]] = field(default_factory=list)
    sums: dict[int, Sums] = field(default_factory=dict)  # by register
    fenced: dict[int, Array | None] | None = None  # what the registers of products had in them at the last wgmma.fence
