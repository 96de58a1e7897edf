"""The bytes between L2 and a program, counted on the PTX, against counts by hand."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest
from ptx import on_traffic
from ptx.compiling import compiling_process

pytestmark = pytest.mark.xdist_group("ptx sm_90")


@pytest.fixture(scope="module")
def process() -> Iterator[ProcessPoolExecutor]:
    with compiling_process() as process:
        yield process


@pytest.mark.parametrize(
    ("stride", "sectors", "lines"),
    [
        (1, 12, 4),  # 96 floats, for 32 are masked; 512 bytes of the next row
        (8, 124, 32),  # each in a sector of its own, and the first four masked; one line for four of them
    ],
)
def test_sectors(process, stride, sectors, lines):
    (counted,) = process.submit(on_traffic.rows, stride).result()
    assert (counted.kernel, counted.grid, counted.place) == ("_rows", (5, 1, 1), (4, 0, 0))
    assert counted.loaded == {"x_ptr": 32 * sectors, "table_ptr": 32}
    assert counted.stored == {"out_ptr": 512}
    assert counted.atomic == {"counter_ptr": 32}
    assert counted.prefetched == {"x_ptr": 128 * lines}
    assert counted.bytes == 32 * sectors + 32 + 512 + 32
    assert counted.programs == 5


def test_a_linear_reads_its_rows_once(process):
    """Of 128 programs the first has 16 rows of the weight, [2048, 11008]."""
    (counted,) = process.submit(on_traffic.op, "down").result()
    assert counted.programs * counted.loaded["weight"] == 2048 * 11008 * 2
    assert counted.loaded["x_ptr"] == 11008 * 2


@pytest.mark.parametrize("length", [64, 640])
def test_attention_reads_the_keys_of_its_length(process, length):
    """A program of two for a sequence: each has the keys and values of one head for some of the tokens."""
    counted = process.submit(on_traffic.op, "decode_attention", length).result()[0]
    keys_and_values = counted.loaded["pages"]
    assert keys_and_values > 0
    assert keys_and_values % (2 * 128 * 2) == 0  # k and v of 128 elements of two bytes a token
    assert keys_and_values <= length * 2 * 128 * 2
