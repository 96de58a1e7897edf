"""Checks that a checkpoint's files lie in its folder, unless the user allows links that lead out of it."""

from __future__ import annotations

from pathlib import Path

from qwenkern.errors import CheckpointError
from qwenkern.kernels.environment import FOLLOW_LINKS


def inside(folder: Path, name: str, named_by: str) -> Path:
    """The path of a weight file, after a check of its target: a downloaded folder must not make qwenkern read files
    outside of it.

    In the Hugging Face hub's cache, .../snapshots/<revision>/<name> is a link to .../blobs/<hash>. This is allowed. Any
    other link out of the folder is followed only if QWENKERN_FOLLOW_LINKS is 1. named_by: where the name comes from,
    for the message if the file is missing. Raises CheckpointError."""
    path, home = folder / name, folder.resolve()
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, up to Python 3.12
        raise CheckpointError(f"{path}: is missing; {named_by} names it") from error
    if not target.is_file():
        raise CheckpointError(f"{path}: leads to {target}; expected a file")
    allowed = {home, home.parent.parent / "blobs"} if home.parent.name == "snapshots" else {home}
    if target.parent not in allowed and not FOLLOW_LINKS.get():
        raise CheckpointError(
            f"{path}: is a link to {target}, outside of {folder}, and a download could link to any of your files; "
            f"expected the file itself, or {FOLLOW_LINKS.name}=1 if you made the link"
        )
    return path
