"""The last norm and the product with the vocabulary, for the last token of each sequence.

    lm_head        logits = rms_norm(residual + x) W', in float32
    lm_head_top_k  the k largest of them and their ids

x [T, K], W [V, K]. Bytes moved: the weight, T K of x and residual, 4 T V of logits (or little, for the top k).
"""

from __future__ import annotations

from torch import Tensor

from .checks import wide
from .contract import Steps, op
from .linear import check_normed, normed_product
from .weights import Weight


@op()
def lm_head(x: Tensor, residual: Tensor | None, norm_weight: Tensor, eps: float, weight: Weight) -> Steps[Tensor]:
    """add_rms_norm of x and residual [T, K], then the product with weight [V, K]: logits [T, V] in float32.

    Up to 16 tokens, logits keep all bits of the float32 sums; above, the library rounds them to x's dtype first."""
    check_normed("lm_head", x, residual, norm_weight, weight)
    yield
    return wide(normed_product(x, residual, norm_weight, eps, weight)[0])


@op()
def lm_head_top_k(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor, eps: float, weight: Weight, k: int
) -> Steps[tuple[Tensor, Tensor]]:
    """The k largest logits of each token [T, k] float32, largest first, and their ids [T, k] int64.

    Of equal logits the lower id comes first: k = 1 is the arg-max. On a GPU, k up to 16 and up to 16 tokens never write
    the logits. NaN comes first, as NaN or as +inf: a token's first value is not finite where one of its logits is NaN
    or +inf."""
    check_normed("lm_head_top_k", x, residual, norm_weight, weight)
    if not 1 <= k <= weight.shape[0]:
        raise ValueError(f"lm_head_top_k: k must be within 1 and the vocabulary's {weight.shape[0]}, and is {k}")
    yield
    logits = wide(normed_product(x, residual, norm_weight, eps, weight)[0])
    values, ids = logits.sort(dim=-1, descending=True, stable=True)
    return values[:, :k], ids[:, :k]
