"""penalise against its reference, bit by bit, because a captured step must choose the tokens that the host chooses."""

from __future__ import annotations

import math

import pytest
import torch
from support.mutations import Mutation
from support.references import guard, guarded_allocations, random

from qwenkern.kernels import reference


@pytest.mark.parametrize("vocabulary", [1, 31, 503, 2049])
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 128])
def test_the_bits_are_those_of_torch(ops, device, rows, vocabulary):
    inputs = _inputs(rows, vocabulary, device)
    given = [guard(each, 3 if at == 0 else 0) for at, each in enumerate(inputs)]
    with guarded_allocations():
        out = ops.penalise(*given)
    assert torch.equal(out, reference.penalise(*inputs))


def test_each_step_by_hand(ops, device):
    """Tokens: fresh, seen above 0, seen below 0, twice in the output, biased, forbidden by the mask, an early end."""
    logits = torch.tensor([[1.0, 2.0, -2.0, 3.0, 1.0, 5.0, 6.0]] * 2, device=device)
    history = torch.tensor([[0, 1, 1, 9, 0, 0, 2]], dtype=torch.int32, device=device)
    bias = torch.tensor([[0, 0, 0, 0, -4.0, 0, 0]], device=device)
    settings = torch.tensor([[2.0, 2.0], [0.25, 0.25], [0.125, 0.125], [1.0, 0.0]], device=device)
    allowed = torch.tensor([[~(1 << 5)]], dtype=torch.int32, device=device)
    out = ops.penalise(logits, torch.zeros(2, dtype=torch.int64, device=device), settings, history, bias, allowed)
    expected = [1.0, 1.0, -4.0, 1.0, -3.0, -math.inf]
    assert out.tolist() == [[*expected, -math.inf], [*expected, 6.0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots": torch.tensor([0, 3])}, "penalise: slots must be within 0 and 2, and one is 3"),
        ({"slots": torch.tensor([0])}, r"penalise: slots must have shape \[2\], and has \[1\]"),
        ({"settings": torch.ones(3, 2)}, r"penalise: settings must have shape \[4, 2\], and has \[3, 2\]"),
        ({"history": torch.zeros(3, 39, dtype=torch.int32)}, r"penalise: history must have shape \[S, 40\]"),
        ({"bias": torch.zeros(2, 40)}, r"penalise: bias must have shape \[3, 40\], and has \[2, 40\]"),
        ({"allowed": torch.zeros(3, 1, dtype=torch.int32)}, r"penalise: allowed must have shape \[3, 2\]"),
        ({"logits": torch.zeros(40)}, r"penalise: logits must have shape \[R, V\], and has \[40\]"),
    ],
    ids=str,
)
def test_wrong_arguments(ops, change, message):
    names = ("logits", "slots", "settings", "history", "bias", "allowed")
    given = dict(zip(names, _inputs(2, 40, torch.device("cpu"), slots=3), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        ops.penalise(**given)


def _inputs(rows, vocabulary, device, slots=None):
    """Histories of all kinds of tokens, and penalties that float32 does not hold exactly."""
    slots, generator = slots or rows + 2, torch.Generator().manual_seed(vocabulary)
    of = {"dtype": torch.float32, "device": device}
    settings = torch.tensor([[1.05, 0.8, 1.3], [0.37, 0.0, -1.1], [0.11, 0.3, 0.0], [0.0, 3.0, -2.0]])
    history = torch.randint(0, 40, (slots, vocabulary), generator=generator, dtype=torch.int32)
    words = torch.randint(-(2**31), 2**31, (slots, -(-vocabulary // 32)), generator=generator)
    return (
        random(rows, vocabulary, **of, scale=4),
        torch.randperm(slots, generator=generator)[:rows].to(device),
        settings[:, torch.arange(rows) % 3].contiguous().to(device),
        history.to(device),
        random(slots, vocabulary, **of, seed=1),
        words.to(torch.int32).to(device),
    )


CASE = {"rows": 7, "vocabulary": 503}
MUTATIONS = [
    Mutation(
        "ends count as seen", "triton/penalise.py", "(history & ~2) > 0", "history > 0", test_each_step_by_hand, {}
    ),
    Mutation(
        "a penalty for what was not in the output",
        "triton/penalise.py",
        "tl.where(count > 0, logit - (presence",
        "tl.where(count >= 0, logit - (presence",
        test_the_bits_are_those_of_torch,
        CASE,
    ),
    Mutation("no bias", "triton/penalise.py", "logit += bias", "logit += 0", test_the_bits_are_those_of_torch, CASE),
    Mutation(
        "the row's slot",
        "triton/penalise.py",
        "bias_ptr + slot *",
        "bias_ptr + row *",
        test_the_bits_are_those_of_torch,
        CASE,
    ),
    Mutation(
        "bits in another order",
        "triton/penalise.py",
        "tl.arange(0, 32)[None, :]",
        "(31 - tl.arange(0, 32)[None, :])",
        test_the_bits_are_those_of_torch,
        CASE,
    ),
    Mutation("the end is always early", "triton/penalise.py", "early > 0", "early > -9", test_each_step_by_hand, {}),
]
