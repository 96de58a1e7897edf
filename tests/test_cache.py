"""Pages: who has them, where tokens go, and that none is lost."""

from __future__ import annotations

import pytest
import torch
from twins import TINY

from qwenkern import RequestError
from qwenkern.cache import BlockTable, PagedCache


@pytest.fixture
def cache():
    return PagedCache(TINY, num_tokens=40, dtype=torch.float32, device=torch.device("cpu"), page_size=4)


def _fill(cache, table, count):
    parts = [(table, list(range(count)))]
    batch = cache.batch(parts)
    cache.k.view(TINY.num_hidden_layers, -1, *cache.k.shape[-2:])[:, batch.slots] = (
        batch.positions[None, :, None, None].float() + 100 * table.pages[0]
    )
    cache.advance(parts)
    return batch


def test_tokens_of_a_batch_go_to_distinct_slots_in_order(cache):
    first, second = BlockTable(), BlockTable()
    _fill(cache, first, 3)
    parts = [(first, [7, 8, 9]), (second, [5])]
    batch = cache.batch(parts)
    assert batch.ids.tolist() == [7, 8, 9, 5]
    assert batch.positions.tolist() == [3, 4, 5, 0]
    assert batch.lengths.tolist() == [6, 1]
    assert batch.query_starts.tolist() == [0, 3, 4]
    assert not batch.is_decode
    page, next_page = first.pages
    assert batch.slots.tolist() == [4 * page + 3, 4 * next_page, 4 * next_page + 1, 4 * second.pages[0]]
    assert batch.block_tables.tolist()[0] == first.pages
    assert len(batch.block_tables[1]) == 2, "the shorter table is padded"


def test_one_token_a_sequence_is_a_decode(cache):
    assert cache.batch([(BlockTable(), [1]), (BlockTable(), [2])]).is_decode


def test_released_pages_come_back(cache):
    tables = [BlockTable() for _ in range(3)]
    for table in tables:
        _fill(cache, table, 5)
    assert cache.num_free_tokens == 40 - 3 * 8
    for table in tables:
        cache.release(table)
        assert (table.pages, table.length) == ([], 0)
    assert cache.num_free_tokens == 40
    cache.release(tables[0])
    assert cache.num_free_tokens == 40, "releasing twice gives nothing twice"


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9])
def test_a_fork_shares_full_pages_and_keeps_its_own_tail(cache, length):
    table = BlockTable()
    _fill(cache, table, length)
    fork = BlockTable()
    cache.fork(table, fork)
    assert fork.length == length
    assert fork.pages[: length // 4] == table.pages[: length // 4]
    if length % 4:
        assert fork.pages[-1] != table.pages[-1]
        filled = slice(0, length % 4)
        assert torch.equal(cache.k[:, fork.pages[-1], filled], cache.k[:, table.pages[-1], filled])
    used = 40 - cache.num_free_tokens
    cache.release(table)
    assert 40 - cache.num_free_tokens == used - (4 if length % 4 else 0), "shared pages stay while the fork uses them"
    cache.release(fork)
    assert cache.num_free_tokens == 40


def test_too_many_tokens_are_refused_and_nothing_is_taken(cache):
    table = BlockTable()
    _fill(cache, table, 30)
    other = BlockTable()
    assert cache.missing_pages(other, 9) == 3 > cache.num_free_pages
    with pytest.raises(RequestError, match=r"room for 8 more tokens of its 40.*needs 9 more.*cache_tokens"):
        cache.extend(other, 9)
    assert other.pages == []
    cache.extend(other, 8)
    assert cache.num_free_pages == 0
