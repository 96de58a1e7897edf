"""The ops of a layer before its attention: add, norm, q k v, rotary embedding, write into the cache.

    residual' = round(residual + x);  qkv = round(rms_norm(residual') W' + bias);  then as rope_and_cache (rope.py)

x is [T, K]. W is [N, K] with N = (Hq + 2 Hkv) D, its heads in the order q, k, v. Values are rounded where norm_linear
and rope_and_cache round them. Bytes moved: the weight, T K elements of x, residual and residual', T N of q, k and v.
"""

from __future__ import annotations

from torch import Tensor

from .checks import check_device, check_tensor
from .contract import Steps, op
from .linear import check_normed, normed_product
from .pages import Pages
from .rope import check_places, rotated_into_cache
from .weights import Weight


@op(mutates=("pages",))
def norm_qkv_rope(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    weight: Weight,
    bias: Tensor | None,
    positions: Tensor,
    cos_sin: Tensor,
    pages: Pages,
    slots: Tensor,
) -> Steps[tuple[Tensor, Tensor]]:
    """Runs norm_linear of x and residual [T, K] with the packed weight [(Hq + 2 Hkv) D, K], then rope_and_cache of the
    result. Returns (q [T, Hq, D], new residual [T, K]).

    Writes k and v into the pages. Arguments and errors are those of the two ops."""
    name = "norm_qkv_rope"
    check_normed(name, x, residual, norm_weight, weight)
    if bias is not None:
        check_tensor(name, "bias", bias, (weight.shape[0],), like=x)
        check_device(name, x=x, bias=bias)
    check_places(name, x, "weight", weight.shape[0], positions, cos_sin, pages, slots)
    yield
    qkv, residual = normed_product(x, residual, norm_weight, eps, weight, bias)
    return rotated_into_cache(qkv, positions, cos_sin, pages, slots), residual
