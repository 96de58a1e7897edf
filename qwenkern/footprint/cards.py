"""Common GPUs and their memory."""

from __future__ import annotations

import difflib
from typing import NamedTuple

from ..errors import RequestError, shown

AS_OF = "2026-11"  # the table's date
GIB = 1 << 30
# The usable share of the nominal memory. The rest goes to error correction (a sixteenth on cards that use their main
# memory for it), to the driver, to a screen, and to fragmentation in the allocator.
USABLE = 0.9


KERNELS_NEED = 80  # the compute capability below which torch runs the ops


class Card(NamedTuple):
    name: str
    gib: int  # the nominal memory
    capability: int  # CUDA's compute capability, major * 10 + minor

    @property
    def memory(self) -> int:
        """Bytes."""
        return self.gib * GIB

    @property
    def is_older(self) -> bool:
        """Whether this is a GPU that the kernels do not run on."""
        return 0 < self.capability < KERNELS_NEED

    @property
    def usable(self) -> int:
        """Bytes for a model, including all other memory of its process on the GPU."""
        return int(USABLE * self.memory)


# Memory: NVIDIA's data sheets. Compute capability: https://developer.nvidia.com/cuda-gpus
CARDS = tuple(
    Card(*each)
    for each in (
        ("RTX 4060", 8, 89),
        ("RTX 3080", 10, 86),
        ("RTX 3060", 12, 86),
        ("RTX 4070", 12, 89),
        ("RTX 5070", 12, 120),
        ("RTX 4060 Ti", 16, 89),
        ("RTX 4080", 16, 89),
        ("RTX 5060 Ti", 16, 120),
        ("RTX 5080", 16, 120),
        ("RTX A4000", 16, 86),
        ("T4", 16, 75),
        ("RTX 3090", 24, 86),
        ("RTX 4090", 24, 89),
        ("A10", 24, 86),
        ("L4", 24, 89),
        ("RTX 5090", 32, 120),
        ("A100 40 GB", 40, 80),
        ("RTX A6000", 48, 86),
        ("RTX 6000 Ada", 48, 89),
        ("L40S", 48, 89),
        ("A100 80 GB", 80, 80),
        ("H100", 80, 90),
        ("RTX PRO 6000", 96, 120),
        ("H200", 141, 90),
        ("B200", 180, 100),
    )
)
# Machines that run the model on the CPU. A GPU that shares this memory, as in a Mac, is not used.
MACHINES = tuple(Card(f"{gib} GB of memory", gib, 0) for gib in (8, 16, 32, 64, 128, 256))


def card_named(name: str, cards: tuple[Card, ...] = CARDS) -> Card:
    """The card of this name; case, spaces and the maker's names do not matter. Raises RequestError."""
    by_key = {_key(card.name): card for card in cards}
    key = _key(name)
    if key not in by_key:
        close = difflib.get_close_matches(key, by_key, n=4, cutoff=0.5) or list(by_key)
        raise RequestError(f"card is {shown(name)}; expected one of {', '.join(by_key[each].name for each in close)}")
    return by_key[key]


def _key(name: str) -> str:
    return "".join(word for word in name.lower().split() if word not in ("nvidia", "geforce", "tesla"))
