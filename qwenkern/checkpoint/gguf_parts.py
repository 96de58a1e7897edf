"""A GGUF model in several files, as llama.cpp splits one: NAME-00001-of-00003.gguf and so on.

The first part has the metadata. Each part has its number in split.no (from 0), the number of parts in split.count, and
the number of tensors of all parts in split.tensors.count.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from qwenkern.errors import CheckpointError, shown

from .gguf_container import Container, read_container
from .links import inside

_NAME = re.compile(r"(.*-)(\d{5})-of-(\d{5})(\.gguf)", re.IGNORECASE | re.DOTALL)
_TOTAL = "split.tensors.count"
_MERGE = "or merge the parts: llama-gguf-split --merge FIRST_PART WHOLE.gguf"


def read_parts(path: Path) -> dict[Path, Container]:
    """The files of a model with their headers; the first part comes first. `path` is the model, or any of its parts.

    The other parts are found by their names in the same folder. Raises CheckpointError if a part is missing, is not
    the one that its name says, or cannot be of the same model."""
    given = read_container(path)
    count, number = given.metadata.get("split.count", 1), given.metadata.get("split.no", 0)
    if count in (0, 1):
        return {path: given}
    if type(count) is not int or type(number) is not int or not 0 <= number < count:
        raise CheckpointError(
            f"{path}: split.no is {shown(number)} and split.count {shown(count)}; expected a part's number, from 0, "
            "below the number of parts"
        )
    named = _NAME.fullmatch(path.name)
    if named is None or (int(named[2]), int(named[3])) != (number + 1, count):
        raise CheckpointError(
            f"{path}: is part {number + 1} of the {count} of a model; expected a name that ends in "
            f"-{number + 1:05}-of-{count:05}.gguf, so that the others can be found; {_MERGE}"
        )
    names = [f"{named[1]}{n:05}-of-{named[3]}{named[4]}" for n in range(1, count + 1)]
    if missing := [name for name in names if not path.with_name(name).exists()]:
        listed = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise CheckpointError(
            f"{path}: is part {number + 1} of the {count} of a model; missing: {listed}; expected all in one folder"
        )
    paths = [path if name == path.name else inside(path.parent, name, path.name) for name in names]
    parts = {each: given if each == path else read_container(each) for each in paths}
    _check(parts)
    return parts


def _check(parts: Mapping[Path, Container]) -> None:
    first_path, first = next(iter(parts.items()))
    shared = {key: value for key, value in first.metadata.items() if key != "general.alignment"}
    seen: dict[str, Path] = {}
    for number, (path, part) in enumerate(parts.items()):
        own = {"split.no": number, "split.count": len(parts), _TOTAL: first.metadata.get(_TOTAL, 0)}
        expected = {key: value for key, value in shared.items() if key in part.metadata} | own
        for key, value in expected.items():
            if (found := part.metadata.get(key)) != value:
                raise CheckpointError(
                    f"{path}: {key} is {shown(found)}; expected {shown(value)}, as its name and {first_path.name} say"
                )
        for name in part.tensors:
            if name in seen:
                raise CheckpointError(f"{path}: tensor {name} is also in {seen[name].name}; expected it in one part")
            seen[name] = path
    if (total := first.metadata[_TOTAL]) != len(seen):
        raise CheckpointError(
            f"{first_path}: {_TOTAL} is {shown(total)}, and the {len(parts)} parts have {len(seen)}; expected the "
            "parts of one model"
        )
