"""Reads checkpoints: loads a folder or a file into the parameters of a module.

    checkpoint = open_checkpoint(path)
    module = ...  # built from checkpoint.config
    load_weights(module, checkpoint.config, checkpoint.tensors(torch.bfloat16), source=str(path))

Each file format has a module with a generator of `(Hugging Face name, tensor)`. `packing.py` defines which parameter
each tensor goes to.
"""

from __future__ import annotations

from pathlib import Path

from qwenkern.errors import CheckpointError
from qwenkern.reading import is_gguf

from .base import Checkpoint
from .packing import check_shapes, load_weights
from .safetensors import open_safetensors

__all__ = ["Checkpoint", "load_weights", "open_checkpoint"]

_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a folder (config.json and *.safetensors) or a GGUF file: reads and checks its header, not its weights.

    A GGUF file is recognised by its ending or by its first four bytes. Of a split GGUF file, any part may be given.
    Raises CheckpointError for a damaged file and for any other kind, ConfigError for a model that qwenkern does not
    run. Pickle files are never opened, because unpickling runs code from the file.
    """
    path = Path(path)
    try:
        return _open(path)
    except OSError as error:  # for example a folder without permission to read, or a name that is too long
        raise CheckpointError(f"{str(path)[:500]}: cannot be read: {error.strerror or error}") from error


def _open(path: Path) -> Checkpoint:
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    checkpoint: Checkpoint
    if path.is_dir() or is_gguf(path):
        if path.is_dir():
            checkpoint = open_safetensors(path)
        else:
            from .gguf import open_gguf  # only GGUF files need the gguf library

            checkpoint = open_gguf(path)
        check_shapes(checkpoint.shapes, checkpoint.config, source=str(path))
        return checkpoint
    if path.suffix.lower() in _PICKLES:
        raise CheckpointError(f"{path}: is a pickle file, which qwenkern never opens; expected safetensors: convert it")
    if path.suffix.lower() == ".safetensors":
        raise CheckpointError(f"{path}: is one file of weights; expected the folder that has it and its config.json")
    raise CheckpointError(f"{path}: expected a folder with config.json and *.safetensors, or a GGUF file")
