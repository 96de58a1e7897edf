"""All tolerances of the tests. No test file has a tolerance of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

RMS_RATIO = 1.5  # a result's root-mean-square error is at most so many times that of torch in the same dtype
YARN_RELATIVE = 2 * torch.finfo(torch.float32).eps  # two roundings: the same products, summed in another order
MEAN_KL_FLOAT32 = 1e-8  # nats per token, between two float32 runs with the same weights
MEAN_KL_PLANES = 1e-6  # the same for quantised weights times x as two planes of int8; 5e-8 in the demo
PLANE_SLACK = 1.02  # a factor of half a unit of a plane, because the quotients are also rounded to float32
MEAN_KL_QUANTISED = 1e-6  # nats per token, for the demo's quantised weights on a CPU; 7e-8 was measured
QUANTISED_TIE = 0.05  # nats between two tokens that such a run may swap
MARGIN_FLOAT32 = 1e-3  # nats between two tokens that float32 may swap: logits near 20 are 2e-6 apart, after 24 layers
NEAR_TIE = (
    0.75  # the same for bfloat16: transformers' own error is 0.09 (root mean square), at most 0.66 in 1,024 tokens
)
DIFFERING = 0.01  # the largest share of elements that round differently because float32 sums have another order
FLOAT64_RELATIVE = 64 * torch.finfo(torch.float64).eps  # one formula in float64, with its terms in another order
BATCH_TIE = 0.25  # nats between two tokens that our own bfloat16 may swap in another batch or in chunks
COARSEST = 1 / 8  # the largest error of a value in any format of cache pages, as a share of the largest value
FP8_RELATIVE = 2 * torch.finfo(torch.float32).eps  # a scale and a quotient, each rounded to float32
FLOAT16_RELATIVE = 2.0**-11  # of a value that float16 pages store, unless it is subnormal or too large
# Pages of one byte per value: the error of a value in steps of int8 codes; for e4m3, as a share of the value, or of the
# least normal value if that is larger; and the error of a scale, one quotient in float32. The first two are a little
# more than half a step, because scales are rounded.
CODE_STEPS = {"int8": 0.50002, "fp8": 0.0626, "scale": 2e-7}
CACHE_KL = {"float16": 2e-5, "int8": 4e-3, "fp8": 8e-2}  # nats per token, for the demo in float32 with such a cache
ROOT_KL_RATIO = 1.05  # a bfloat16 run's distance from the truth is at most so many times transformers'; squared: 1.1


def assert_as_close_as(out: Tensor, peer: Tensor | Sequence[Tensor], truth: Tensor) -> None:
    """``out`` is as close to ``truth`` (float64) as ``peer``, another implementation in the same dtype, is.

    The largest error may be twice the peer's plus two roundings of the largest value; the root-mean-square error
    RMS_RATIO times the peer's plus half a rounding. After layers that magnify roundings, the largest error of a single
    result is random. Then pass several peers: the same function with its sums in other orders
    (models.in_other_orders)."""
    peers = torch.stack([peer] if isinstance(peer, Tensor) else list(peer))
    assert truth.dtype == torch.float64
    assert out.shape == peers.shape[1:] == truth.shape
    for name, tensor in (("out", out), ("peer", peers), ("truth", truth)):
        assert torch.isfinite(tensor).all(), f"{name} has values that are not finite"
    ours, theirs = (out.double() - truth).abs(), (peers.double() - truth).abs()
    rounding = torch.finfo(peers.dtype).eps * truth.abs().max().item()
    allowed = 2 * theirs.max().item() + 2 * rounding
    assert ours.max().item() <= allowed, f"largest error {ours.max():.3g}, allowed {allowed:.3g}"
    rms, allowed = ours.square().mean().sqrt().item(), RMS_RATIO * theirs.square().mean().sqrt().item() + rounding / 2
    assert rms <= allowed, f"root-mean-square error {rms:.3g}, allowed {allowed:.3g}"


def plane_errors(x: Tensor, weight: Tensor, planes: int) -> tuple[Tensor, Tensor]:
    """The largest and the expected (root-mean-square) error of x [T, K] times weight [N, K] transposed (float64): two
    tensors [T, N].

    32 values of x are multiples of a unit, which is 1/127 of the largest value with one plane of int8, and 128 times
    finer with two planes. The error of a value is at most half a unit, and is uniformly distributed. Products of
    integers are exact; the scaled sums of each 16 or 32 are added in float32."""
    units = x.unflatten(1, (-1, 32)).abs().amax(2) / (127 * 128 ** (planes - 1))
    groups = weight.unflatten(1, (-1, 32))
    worst = units / 2 @ groups.abs().sum(2).T * PLANE_SLACK
    expected = (units.square() / 12 @ groups.square().sum(2).T).sqrt()
    floats = 4 * torch.finfo(torch.float32).eps * (x.abs() @ weight.abs().T)
    return worst + floats, expected + floats


def assert_within_planes(out: Tensor, truth: Tensor, worst: Tensor, expected: Tensor) -> None:
    """The errors of ``out`` are within those of ``plane_errors``, plus the rounding of ``out``: each error is at most
    ``worst``, and their root mean square at most RMS_RATIO times ``expected``."""
    assert truth.dtype == torch.float64
    assert out.shape == truth.shape
    assert torch.isfinite(out).all()
    error, rounding = (out.double() - truth).abs(), torch.finfo(out.dtype).eps * truth.abs()
    assert (error <= worst + rounding).all(), f"an error is {(error - worst - rounding).max():.3g} larger than allowed"
    rms, allowed = error.square().mean().sqrt().item(), RMS_RATIO * (expected + rounding).square().mean().sqrt().item()
    assert rms <= allowed, f"root-mean-square error {rms:.3g}, allowed {allowed:.3g}"


def assert_same_formula(out: Tensor, expected: Tensor) -> None:
    """Both tensors are float64, and differ by at most FLOAT64_RELATIVE of the largest value."""
    assert out.dtype == expected.dtype == torch.float64
    assert torch.isfinite(out).all()
    assert out.shape == expected.shape
    error, allowed = (out - expected).abs().max().item(), FLOAT64_RELATIVE * expected.abs().max().item()
    assert error <= allowed, f"largest error {error:.3g}, allowed {allowed:.3g}"


def assert_nearly_equal(out: Tensor, peer: Tensor) -> None:
    """At most the share DIFFERING of the elements have different bits."""
    assert torch.isfinite(out).all()
    differing = (out != peer).double().mean().item()
    assert differing <= DIFFERING, f"{differing:.1%} of the elements differ"


def assert_roughly_equal(out: Tensor, expected: Tensor) -> None:
    """``out`` is ``expected`` after a round trip through cache pages of any format."""
    assert (out.shape, out.dtype) == (expected.shape, expected.dtype)
    assert torch.isfinite(out).all()
    assert (out - expected).abs().max() <= COARSEST * expected.abs().max()


def divergences(truth: Tensor, other: Tensor) -> Tensor:
    """Kullback-Leibler divergence of ``other`` from ``truth``, logits [T, V], in nats: [T], in float64."""
    few = 16  # rows at a time: with a whole vocabulary in float64, more rows would take hundreds of MB
    found = []
    for rows in zip(truth.split(few), other.split(few), strict=True):
        exact, approximate = (logits.double().log_softmax(-1) for logits in rows)
        found.append((exact.exp() * (exact - approximate)).sum(-1).clamp(min=0))
    return torch.cat(found)


# The largest root-mean-square error of rounding standard normal numbers to a quantised format
ROUNDING_ERRORS = {
    "q4_0": 0.09,
    "q4_1": 0.085,
    "q5_0": 0.045,
    "q5_1": 0.04,
    "q8_0": 0.006,
    "q2_k": 0.32,
    "q3_k": 0.16,
    "q4_k": 0.085,
    "q5_k": 0.042,
    "q6_k": 0.021,
    "int4": 0.105,
    "int8": 0.0065,
}
