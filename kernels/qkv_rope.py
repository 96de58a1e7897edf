"""The ops of a layer before its attention: norm, q k v, rotary embedding, write into the cache.

    qkv = round(rms_norm(x) W' + bias);  then as rope_and_cache (rope.py)

x is [T, K]. W is [N, K] with N = (Hq + 2 Hkv) D, its heads in the order q, k, v. Values are rounded where norm_linear
and rope_and_cache round them. Bytes moved: the weight, T K elements of x, T N of q, k and v.
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
    norm_weight: Tensor,
    eps: float,
    weight: Weight,
    bias: Tensor | None,
    positions: Tensor,
    cos_sin: Tensor,
    pages: Pages,
    slots: Tensor,
) -> Steps[Tensor]:
    """Runs norm_linear of x [T, K] with the packed weight [(Hq + 2 Hkv) D, K], then rope_and_cache of the result.
    Returns q [T, Hq, D].

    Writes k and v into the pages. Arguments and errors are those of the two ops."""
    name = "norm_qkv_rope"
    check_normed(name, x, norm_weight, weight)
    if bias is not None:
        check_tensor(name, "bias", bias, (weight.shape[0],), like=x)
        check_device(name, x=x, bias=bias)
    check_places(name, x, "weight", weight.shape[0], positions, cos_sin, pages, slots)
    yield
    qkv = normed_product(x, norm_weight, eps, weight, bias)
    return rotated_into_cache(qkv, positions, cos_sin, pages, slots)
