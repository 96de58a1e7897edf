"""The last norm and the product with the vocabulary, for the last token of each sequence.

    lm_head        logits = rms_norm(x) W', in float32
    lm_head_top_k  the k largest logits of each token, and their ids

x is [T, K], W is [V, K]. Bytes moved: the weight, T K elements of x, and 4 T V bytes of logits. The top k
of few tokens writes only its candidates.
"""

from __future__ import annotations

from torch import Tensor

from .checks import wide
from .contract import Steps, op
from .linear import check_normed, normed_product
from .weights import Weight


@op()
def lm_head(x: Tensor, norm_weight: Tensor, eps: float, weight: Weight) -> Steps[Tensor]:
    """Runs rms_norm of x [T, K], then the product with weight [V, K]. Returns logits [T, V] in float32.

    For up to 16 tokens (48 with a quantised weight) the kernels return the float32 sums as they are. For more, torch's
    matrix product rounds the logits to x's dtype first."""
    check_normed("lm_head", x, norm_weight, weight)
    yield
    return wide(normed_product(x, norm_weight, eps, weight))


@op()
def lm_head_top_k(x: Tensor, norm_weight: Tensor, eps: float, weight: Weight, k: int) -> Steps[tuple[Tensor, Tensor]]:
    """The k largest logits of each token, [T, k] float32 in descending order, and their ids, [T, k] int64.

    Of equal logits, the one with the lower id comes first, so k = 1 is argmax. On a GPU, for as few tokens as in
    lm_head and k up to 16, the logits are never written to memory. NaN comes first, as NaN or as +inf: if one of a
    token's logits is NaN or +inf, its first value is not finite."""
    check_normed("lm_head_top_k", x, norm_weight, weight)
    if not 1 <= k <= weight.shape[0]:
        raise ValueError(f"lm_head_top_k: k must be within 1 and the vocabulary's {weight.shape[0]}, and is {k}")
    yield
    logits = wide(normed_product(x, norm_weight, eps, weight))
    values, ids = logits.sort(dim=-1, descending=True, stable=True)
    return values[:, :k], ids[:, :k]
