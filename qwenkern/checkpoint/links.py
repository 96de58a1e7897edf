"""Where the files of a checkpoint may lie: in its folder, unless the user says that links may lead out of it."""

from __future__ import annotations

from pathlib import Path

from qwenkern.errors import CheckpointError
from qwenkern.kernels.environment import FOLLOW_LINKS


def inside(folder: Path, name: str, named_by: str) -> Path:
    """The path of a file of weights, after a look at where it leads: a download must not make us read files elsewhere.

    The Hugging Face hub's cache keeps .../snapshots/<revision>/<name> as links to .../blobs/<hash>, which is allowed.
    Any other link out of the folder is followed only where QWENKERN_FOLLOW_LINKS is 1. named_by: what names the file,
    for the message where it is missing. Raises CheckpointError."""
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
            f"{path}: is a link to {target}, outside of {folder}, as a download could have it to any file of yours; "
            f"expected the file itself, or {FOLLOW_LINKS.name}=1 where you made the link"
        )
    return path
