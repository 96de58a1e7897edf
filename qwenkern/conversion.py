"""Carries out ``quantize=``: quantises dense matrices as they load, or dequantises quantised ones."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from .allocation import allocate
from .checkpoint import Checkpoint
from .checkpoint.adjacent import Adjacent
from .checkpoint.formats import NONE, form_of, formats_of
from .config import Config
from .errors import RequestError, shown
from .kernels import Weight
from .kernels.c import threads
from .kernels.weights import FORMATS, Dense

logger = logging.getLogger(__name__)

_AT_ONCE = 1 << 20  # values that a thread rounds at a time

CHOICES = ("int8", "int4", "fp8")


@dataclass(frozen=True)
class Conversion:
    """How the matrices of a model are stored. ``name`` is None (as the checkpoint has them), "none", or one of CHOICES.

    is_quantised: whether a matrix is quantised."""

    name: str | None
    is_quantised: bool

    @property
    def is_dense(self) -> bool:
        """Whether the checkpoint is asked for dense matrices only."""
        return self.name in NONE

    def of(
        self, tensors: Iterable[tuple[str, Tensor | Weight]], config: Config, dtype: torch.dtype
    ) -> Iterator[tuple[str, Tensor | Weight]]:
        """Yields the converted tensors of a checkpoint, with Hugging Face's names. ``dtype``: of the activations."""
        if self.name not in CHOICES:
            yield from tensors
            return
        formats = formats_of(config, self.name, dtype)
        planned = {name: weight for name, weight in formats.items() if not isinstance(weight, Dense)}
        allocated = Adjacent(planned, config, dtype)
        dense: list[str] = []
        for name, tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.dim() == 2:
                weight = rounded(tensor, allocated(name)) if name in planned else self.quantised(name, tensor, dtype)
                dense += [name] if weight is None else []
                yield name, tensor if weight is None else weight
            else:
                yield name, tensor
        if dense:
            logger.warning(
                "%d matrices (such as %s) stay dense, because %s does not support their size",
                *(len(dense), dense[0], self.name),
            )

    def quantised(self, name: str, matrix: Tensor, dtype: torch.dtype) -> Weight | None:
        """A matrix, quantised to the format of this conversion, in new memory on the matrix's device. None if the
        format does not support its size. ``dtype``: of the activations."""
        form = self.format_of(name)
        rows, columns = matrix.shape
        try:
            weight = form.allocate(rows, columns, dtype, lambda shape, dtype: allocate(shape, dtype, matrix.device))
        except RequestError:
            raise
        except ValueError:
            return None
        return rounded(matrix, weight)

    def format_of(self, name: str) -> type[Weight]:
        """The format of a matrix; ``name`` begins with the name of its module."""
        assert self.name is not None
        return FORMATS[form_of(name, self.name)]


def rounded(matrix: Tensor, weight: Weight) -> Weight:
    """Quantises a matrix into ``weight``, and returns the weight. On a CPU each thread rounds some rows at a time.
    torch's own threads would wait at a barrier after each of many short operations."""
    if matrix.device.type != "cpu":
        weight.copy_(matrix)
        return weight
    team, rows = threads.count(), max(16, _AT_ONCE // matrix.shape[1] // 16 * 16)
    with threads.one_in_torch(), ThreadPoolExecutor(team) as pool:
        for done in [
            pool.submit(weight.rows(start, min(start + rows, len(matrix))).copy_, matrix[start : start + rows])
            for start in range(0, len(matrix), rows)
        ]:
            done.result()
    return weight


def choose_conversion(quantize: str | None, checkpoint: Checkpoint | None = None) -> Conversion:
    """The conversion that ``quantize=`` requests, for a checkpoint or for random weights. Raises RequestError for an
    unknown value, and for one of CHOICES if the checkpoint is quantised already."""
    if quantize is not None and (not isinstance(quantize, str) or quantize not in (*CHOICES, *NONE)):
        names = ", ".join(map(repr, (*CHOICES, NONE[0])))
        raise RequestError(f"quantize is {shown(quantize)}; expected None or one of {names}")
    formats = sorted({weight.format for weight in checkpoint.formats.values()}) if checkpoint else []
    if checkpoint and formats and quantize in CHOICES:
        raise RequestError(
            f"quantize is {quantize!r}, and the weights of {checkpoint.path} are quantised already "
            f"({', '.join(formats)}); expected None, or 'none', which dequantises them"
        )
    return Conversion(quantize, quantize in CHOICES or (bool(formats) and quantize is None))
