"""Breaks the kernels by each file's MUTATIONS. The test named with a mutation must fail."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
from support import mutations as mutants

FILES = [
    file
    for file in sorted(Path(__file__).parent.glob("test_*.py"))
    if file != Path(__file__) and re.search(r"^MUTATIONS\b", file.read_text("utf-8"), re.MULTILINE)
]
MUTATIONS = [mutation for file in FILES for mutation in importlib.import_module(file.stem).MUTATIONS]


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, Triton compiles and its interpreter is off")
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: f"{mutation.file}: {mutation.name}")
def test_a_broken_kernel_is_noticed(mutation, ops, tmp_path):
    mutation.test(ops, torch.device("cpu"), **mutation.parameters)  # without the mutation it passes
    mutant = mutants.load(mutation, tmp_path)
    try:
        with pytest.raises(AssertionError):
            mutation.test(mutant, torch.device("cpu"), **mutation.parameters)
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == mutant.__name__]:
            del sys.modules[name]
