"""Models that do not fit are refused with the numbers, and others are not; the memory of this machine; the GPUs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support.models import TINY, save_checkpoint, tiny_model

from qwenkern import Config, Model, RequestError, loading
from qwenkern.footprint import (
    Memory,
    cache_room,
    fit,
    layout_of,
    memory,
    memory_of,
    refuse_too_large,
    room,
)
from qwenkern.footprint.cards import CARDS, card_named
from qwenkern.hub import huggingface

SMALL = Config.from_name("qwen2.5-3b")
LARGE = Config.from_name("qwen2.5-72b")
GPU, CPU = torch.device("cuda"), torch.device("cpu")
GIB = 1 << 30


def test_all_numbers_are_in_the_refusal(monkeypatch):
    monkeypatch.setattr(fit, "memory_of", lambda device: Memory(80 * GIB, 79 * GIB))
    with pytest.raises(RequestError) as refused:
        refuse_too_large(layout_of(LARGE, GPU), GPU, "Qwen2.5-72B")
    assert str(refused.value) == (
        "Qwen2.5-72B: does not fit on cuda: weights 145.41 GB, a cache of 64 tokens 0.04 GB, activations 0.00 GB: "
        "145.46 GB, and 84.83 GB of 85.90 GB are free; expected a smaller model or cache, or quantised weights"
    )
    refuse_too_large(layout_of(LARGE, GPU, quantize="int4"), GPU, "Qwen2.5-72B")


@pytest.mark.parametrize("device", [GPU, CPU])
def test_what_fits_to_the_byte_is_not_refused(monkeypatch, device):
    layout = layout_of(SMALL, device)
    needed = layout.least().total
    monkeypatch.setattr(fit, "memory_of", lambda device: Memory(needed, needed - 100, kept=100))
    refuse_too_large(layout, device, "it")
    monkeypatch.setattr(fit, "memory_of", lambda device: Memory(needed, needed - 100, kept=99))
    with pytest.raises(RequestError, match="it: does not fit"):
        refuse_too_large(layout, device, "it")
    refuse_too_large(layout, device, "it", mapped=1)


def test_a_requested_cache_counts_on_a_gpu(monkeypatch):
    """On a CPU its memory is taken page by page."""
    monkeypatch.setattr(fit, "memory_of", lambda device: Memory(8 * GIB, 8 * GIB))
    refuse_too_large(layout_of(SMALL, CPU), CPU, "it", cache_tokens=65536)
    refuse_too_large(layout_of(SMALL, GPU), GPU, "it", cache_tokens=32768)
    with pytest.raises(RequestError, match=r"a cache of 65536 tokens 2.42 GB"):
        refuse_too_large(layout_of(SMALL, GPU), GPU, "it", cache_tokens=65535)


def test_no_weight_is_read_of_a_checkpoint_that_does_not_fit(monkeypatch, tmp_path):
    save_checkpoint(tiny_model(), tmp_path / "tiny")
    least = layout_of(TINY, CPU, dtype="float32").least().total
    monkeypatch.setattr(fit, "memory_of", lambda device: Memory(least, least))
    assert Model.from_pretrained(tmp_path / "tiny", device="cpu").dtype == torch.float32
    monkeypatch.setattr(fit, "memory_of", lambda device: Memory(least - 1, least - 1))
    monkeypatch.setattr(loading, "load_weights", None)
    monkeypatch.setattr(loading, "Qwen2", None)
    with pytest.raises(RequestError, match=r"tiny: does not fit on cpu: weights 0.00 GB"):
        Model.from_pretrained(tmp_path / "tiny", device="cpu")
    with pytest.raises(RequestError, match="does not fit on cpu"):
        Model.from_config(TINY, device="cpu", dtype="float32")


def test_no_weight_is_downloaded_of_a_model_that_does_not_fit(monkeypatch, tmp_path):
    save_checkpoint(tiny_model(), tmp_path / "tiny")
    asked = []

    def download(hub_id, files):
        asked.append(files)
        return tmp_path / "tiny"

    monkeypatch.setattr(huggingface, "_download", download)
    monkeypatch.setattr(fit, "memory_of", lambda device: Memory(1000, 1000))
    with pytest.raises(RequestError, match="somebody/tiny: does not fit on cpu"):
        Model.from_pretrained("somebody/tiny", device="cpu")
    assert asked == [["config.json"]]


@pytest.mark.parametrize(
    ("groups", "limits", "expected"),
    [
        ("0::/\n", {}, None),
        ("0::/\n", {"memory.max": "max\n"}, None),
        ("0::/\n", {"memory.max": "2147483648\n"}, 2 * GIB),
        ("0::/a/b\n", {"a/memory.max": "2000", "a/b/memory.max": "max"}, 2000),
        ("0::/a/b\n", {"a/memory.max": "3000", "a/b/memory.max": "1000"}, 1000),
        ("0::/host/path\n", {"memory.max": "4000"}, 4000),
        ("0::/\n", {"memory.max": "nonsense"}, None),
        ("4:memory:/x\n0::/\n", {"memory/x/memory.limit_in_bytes": "5000\n"}, 5000),
        ("4:memory:/x\n", {"memory/memory.limit_in_bytes": "6000\n"}, 6000),
        ("4:memory:/x\n", {"memory/x/memory.limit_in_bytes": "9223372036854771712\n"}, None),
        ("4:cpu:/x\n", {"memory/x/memory.limit_in_bytes": "5000\n"}, None),
    ],
)
def test_the_smallest_limit_of_the_cgroups(tmp_path, groups, limits, expected):
    process, root = tmp_path / "cgroup", tmp_path / "fs"
    process.write_text(groups)
    for name, content in limits.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    assert memory.cgroup_limit(process, root) == expected


def test_without_cgroups_or_swap(tmp_path):
    assert memory.cgroup_limit(tmp_path / "none", tmp_path) is None
    assert memory.swap_space(tmp_path / "none") == 0
    (tmp_path / "meminfo").write_text("MemTotal:  24684096 kB\nSwapTotal:        2048 kB\nSwapFree: 0 kB\n")
    assert memory.swap_space(tmp_path / "meminfo") == 2 << 20


def test_main_memory_is_the_cgroups_limit_where_that_is_less(monkeypatch):
    whole = memory.main_memory()
    monkeypatch.setattr(memory, "cgroup_limit", lambda: 1000)
    assert memory.main_memory() == 1000
    assert memory_of(CPU).total == 1000 + memory.swap_space()
    monkeypatch.setattr(memory, "cgroup_limit", lambda: 1 << 50)
    assert memory.main_memory() == whole or memory.main_memory() < 1 << 50


def test_a_gpus_memory_is_what_is_free_and_what_torch_keeps(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (700, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20)
    assert memory_of(GPU) == Memory(1000, 700, 30)
    assert memory_of(GPU).available == 730


@pytest.mark.parametrize(
    ("whole", "weights", "expected"),
    [
        (64 * GIB, 6 * GIB, 4 * 32768),  # four contexts
        (8 * GIB, GIB, (4 * GIB // (64 * 36864) - 1) * 64),  # half of the memory
        (8 * GIB, 6 * GIB, ((2 * GIB - (512 << 20)) // (64 * 36864) - 1) * 64),  # what the weights leave
        (8 * GIB, 9 * GIB, 64),
    ],
)
def test_the_default_cache_of_a_cpu(monkeypatch, whole, weights, expected):
    monkeypatch.setattr(room, "main_memory", lambda: whole)
    assert cache_room(layout_of(SMALL, CPU), CPU, None, 512, weights) == expected


def test_a_gpu_without_room_for_a_page(monkeypatch):
    monkeypatch.setattr(room, "memory_of", lambda device: Memory(8 * GIB, GIB // 2))
    with pytest.raises(RequestError, match=r"cuda has no memory left for a key-value cache: -0.\d\d GB without a res"):
        cache_room(layout_of(SMALL, GPU), GPU, None, 4096, 0)


def test_the_largest_cache_is_that_of_all_memory(monkeypatch):
    layout = SimpleNamespace(page=100)
    monkeypatch.setattr(room, "memory_of", lambda device: Memory(5000, 400, kept=120))
    assert cache_room(layout, GPU, 256, 512, 0) == 256, "five pages, and one of them is the spare one"
    with pytest.raises(RequestError, match="cache_tokens is 257; expected at most 256: cuda has no more memory"):
        cache_room(layout, GPU, 257, 512, 0)


@pytest.mark.parametrize("name", ["RTX 4090", "rtx4090", "NVIDIA GeForce RTX 4090"])
def test_cards_by_name(name):
    card = card_named(name)
    assert (card.name, card.gib, card.usable) == ("RTX 4090", 24, int(0.9 * 24 * GIB))


def test_an_unknown_card(monkeypatch):
    with pytest.raises(RequestError, match=r"card is 'RTX 4099'; expected one of .*RTX 4090"):
        card_named("RTX 4099")
    with pytest.raises(RequestError, match=r"card is ''; expected one of RTX 4060, .*B200"):
        card_named("")


def test_each_card_once_and_in_order():
    assert len({card.name for card in CARDS}) == len(CARDS) >= 20
    assert [card.gib for card in CARDS] == sorted(card.gib for card in CARDS)
