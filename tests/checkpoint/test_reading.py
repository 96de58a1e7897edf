"""A checkpoint's small files: their limits, in all code that reads them."""

from __future__ import annotations

import os
import tracemalloc

import pytest
from checkpoint.test_checkpoint import INDEX, write_sharded
from support.toy_tokenizer import byte_library

from qwenkern.checkpoint import open_checkpoint
from qwenkern.errors import CheckpointError, ConfigError, Error
from qwenkern.reading import LARGEST, read_json, read_text
from qwenkern.text.tokenizer import Tokenizer


def test_line_ends_are_read_reference_model_reads_them(tmp_path):
    (tmp_path / "a.jinja").write_bytes("a\r\nb 字".encode())
    assert read_text(tmp_path / "a.jinja") == "a\nb 字"


def test_json_objects(tmp_path):
    assert read_json(tmp_path / "absent.json") == {}
    (tmp_path / "a.json").write_text('{"a": [1, {"b": null}]}')
    assert read_json(tmp_path / "a.json") == {"a": [1, {"b": None}]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1]", "holds a list; expected a JSON object"),
        (b'{"a": {"b": 1, "b": 2}}', "'b' occurs twice"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not readable as JSON"),
        (b"[" * 100_000, "not readable as JSON"),
        (b"\xff", "not readable as UTF-8 text"),
        (b" " * LARGEST + b"{}", f"has {LARGEST + 2} bytes; expected at most {LARGEST}"),
    ],
    ids=["list", "twice", "digits", "deep", "no text", "large"],
)
def test_what_is_refused(content, message, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"a\.json: .*{message}"):
        read_json(tmp_path / "a.json", ConfigError)


def test_what_is_no_file(tmp_path):
    (tmp_path / "folder.json").mkdir()
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "dangling.json").symlink_to("nowhere")
    for name in ("folder.json", "pipe.json", "dangling.json"):
        with pytest.raises(CheckpointError, match=name):
            read_json(tmp_path / name)


def test_pointers_of_git_lfs_are_named(tmp_path):
    write_sharded(tmp_path)
    (tmp_path / INDEX).unlink()
    for shard in tmp_path.glob("model-*"):
        shard.unlink()
    for name in ("model.safetensors", "tokenizer.json", "model.gguf"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    for read in (open_checkpoint, Tokenizer.from_folder, lambda folder: open_checkpoint(folder / "model.gguf")):
        with pytest.raises(CheckpointError, match=r"(model|tokenizer)\.[a-z]+: is a Git LFS pointer; expected"):
            read(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", INDEX, "tokenizer_config.json", "chat_template.jinja"],
)
def test_a_file_of_gigabytes_is_not_read(name, tmp_path):
    write_sharded(tmp_path)
    byte_library().save(str(tmp_path / "tokenizer.json"))
    with open(tmp_path / name, "wb") as sparse:
        sparse.truncate(4 << 30)
    tracemalloc.start()
    try:
        with pytest.raises(Error, match=rf"{name}: has 4294967296 bytes; expected at most"):  # noqa: PT012
            open_checkpoint(tmp_path)
            Tokenizer.from_folder(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 8 * LARGEST
    finally:
        tracemalloc.stop()
