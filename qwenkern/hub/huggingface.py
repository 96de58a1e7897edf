"""The Hugging Face hub: a model's whole repository through huggingface_hub, or one file of known size over HTTPS.

HF_ENDPOINT names another server, and HF_HUB_OFFLINE=1 forbids requests, as in huggingface_hub."""

from __future__ import annotations

import http.client
import os
import queue
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from ..config import Config
from ..errors import CheckpointError, ConfigError

ANSWER = 3.0  # seconds within which the hub must begin its answer
STALL, SLOWEST = 10.0, 10_000  # a download has stalled if it averages less than SLOWEST bytes/s over STALL seconds

_FILES = ["*.safetensors", "*.json", "*.jinja", "merges.txt", "LICENSE*"]  # no pickle files: loading one runs its code
_CHUNK = 1 << 20
Accept = Callable[[Config], None]
_TRUE = ("1", "ON", "YES", "TRUE")


@dataclass(frozen=True)
class HubFile:
    """An origin: one file of a repository, at one revision."""

    repository: str
    revision: str
    file: str
    size: int  # in bytes

    @property
    def name(self) -> str:
        try:
            return urlsplit(_endpoint()).hostname or _endpoint()
        except ValueError:  # HF_ENDPOINT is not a URL
            return _endpoint()

    def space(self, done: int) -> int:
        """Bytes of disk that the rest of the download needs, after ``done`` bytes."""
        return max(0, self.size - done)

    def complete(self, file: BinaryIO, scratch: Path, report: Callable[[int], None]) -> None:
        """Completes a file that holds the beginning of the whole: downloads the rest and appends it.

        report: called with the number of bytes that the file has. Raises CheckpointError if requests are forbidden, or
        if the hub does not begin an answer within ANSWER seconds, answers with another size, or stalls. The bytes
        received so far stay in the file."""
        start = file.seek(0, os.SEEK_END)
        if start == self.size:
            return
        if start > self.size:
            start = file.seek(0)
        try:
            with self._answer(start) as answer:
                start = self._where_it_begins(answer, start)
                file.seek(start)
                file.truncate()
                self._copy(answer, file, start, report)
        finally:
            file.flush()
            os.fsync(file.fileno())

    def _answer(self, start: int) -> http.client.HTTPResponse:
        """The hub's answer, as soon as its headers have come. A thread makes the request, and this function waits for
        it at most ANSWER seconds, because a socket's timeout does not include the DNS lookup."""
        if any(os.environ.get(name, "").upper() in _TRUE for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")):
            raise self._unavailable("is not asked, because HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set")
        url = f"{_endpoint()}/{self.repository}/resolve/{self.revision}/{self.file}"
        answers: queue.SimpleQueue = queue.SimpleQueue()

        def ask() -> None:
            try:
                request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
                answers.put(urllib.request.urlopen(request, timeout=STALL))
            except Exception as error:  # raised below, in the waiting thread
                answers.put(error)

        threading.Thread(target=ask, daemon=True).start()
        try:
            answer = answers.get(timeout=ANSWER)
        except queue.Empty:
            raise self._unavailable(f"did not answer within {ANSWER:g} s") from None
        if isinstance(answer, (OSError, http.client.HTTPException, ValueError)):  # ValueError: HF_ENDPOINT is not a URL
            raise self._unavailable(f"did not answer: {answer}") from answer
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _where_it_begins(self, answer: http.client.HTTPResponse, start: int) -> int:
        """The offset in the file of the answer's first byte. Raises CheckpointError if the answer is not the rest of
        the file."""
        if answer.status != 206:
            start = 0  # the server ignored the range, or none was requested
        elif not (answer.headers.get("Content-Range") or "").startswith(f"bytes {start}-"):
            raise self._unavailable(f"answered with {answer.headers.get('Content-Range')}; expected bytes {start}-")
        found, expected = answer.headers.get("Content-Length"), str(self.size - start)
        if found != expected:  # such as the login page of a captive portal
            raise self._unavailable(f"answered with {found} bytes; expected {expected}")
        return start

    def _copy(self, answer: http.client.HTTPResponse, file: BinaryIO, done: int, report: Callable[[int], None]) -> None:
        report(done)
        watched, since = done, time.monotonic()
        while done < self.size:
            try:
                chunk = answer.read1(min(_CHUNK, self.size - done))
            except (OSError, http.client.HTTPException) as error:
                raise self._unavailable(f"stopped after {done} of {self.size} bytes: {error}") from error
            if not chunk:
                raise self._unavailable(f"stopped after {done} of {self.size} bytes")
            file.write(chunk)
            done += len(chunk)
            report(done)
            if (elapsed := time.monotonic() - since) > STALL:
                if done - watched < SLOWEST * elapsed:
                    raise self._unavailable(f"stalled after {done} of {self.size} bytes")
                watched, since = done, time.monotonic()

    def _unavailable(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.name}: {what}")


def snapshot(hub_id: str, accept: Accept | None = None) -> Path:
    """Downloads a model's repository to huggingface_hub's own cache. Returns the folder. huggingface_hub shows its own
    progress bars.

    config.json is downloaded first. Raises ConfigError if qwenkern cannot run the model, and CheckpointError if it
    cannot read the model's quantised weights. ``accept`` then gets the configuration, and may raise, too. Raises
    CheckpointError if the download fails."""
    folder = _download(hub_id, ["config.json"])
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{hub_id}: has no config.json, expected a model's repository; from one with GGUF files, download one file "
            "(all parts of a split one), and give its path"
        )
    try:
        config = Config.from_json(folder / "config.json")  # before gigabytes of weights are downloaded
    except (ConfigError, CheckpointError) as error:
        raise type(error)(f"{hub_id}: {error}") from error
    if accept is not None:
        accept(config)
    folder = _download(hub_id, _FILES)
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(f"{hub_id}: found no .safetensors file in {folder}, expected the model's weights")
    return folder


def _download(hub_id: str, files: list[str]) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise CheckpointError(
            f'{hub_id}: hub models need huggingface_hub, which is not installed: pip install "qwenkern[hub]"'
        ) from error
    try:
        return Path(snapshot_download(hub_id, allow_patterns=files))
    except Exception as error:  # errors of the hub, of its HTTP client (which varies) and of the system
        reason = next(iter(str(error).strip().splitlines()), "no reason given")
        raise CheckpointError(
            f"{hub_id}: the download from the hub failed, expected a snapshot: {type(error).__name__}: {reason}"
        ) from error


def _endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
