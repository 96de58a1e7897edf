"""Every kernel, broken on purpose in each file's MUTATIONS: the test named there notices."""

from __future__ import annotations

import sys

import mutants
import pytest
import test_attention
import test_decode_attention
import test_linear
import test_lm_head
import test_prefill_attention
import test_rms_norm
import test_rms_norm_backward
import test_rope
import test_swiglu
import test_swiglu_backward
import torch

MODULES = (
    test_attention,
    test_decode_attention,
    test_linear,
    test_lm_head,
    test_prefill_attention,
    test_rms_norm,
    test_rms_norm_backward,
    test_rope,
    test_swiglu,
    test_swiglu_backward,
)
MUTATIONS = [mutation for module in MODULES for mutation in module.MUTATIONS]


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, Triton compiles and its interpreter is off")
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: f"{mutation.file}: {mutation.name}")
def test_a_broken_kernel_is_noticed(mutation, ops, tmp_path):
    mutation.test(ops, torch.device("cpu"), **mutation.parameters)  # whole, it passes
    mutant = mutants.load(mutation, tmp_path)
    try:
        with pytest.raises(AssertionError):
            mutation.test(mutant, torch.device("cpu"), **mutation.parameters)
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == mutant.__name__]:
            del sys.modules[name]
