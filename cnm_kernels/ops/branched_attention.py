from __future__ import annotations

from typing import cast

from torch import Tensor

from cnm_kernels.checks import Arguments
from cnm_kernels.ops._call import run
from cnm_kernels.ops._checks import check_attention, finite, for_backend


def branched_attention(
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    *,
    key_weights: Tensor,
    causal: bool = False,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """``weighted_attention`` of the same operands under several weightings of the keys, its scores computed once.

    The branches of CNM's second decoding enter their first layer so, the positive with g, the hard negative with ones
    and the easy one with 1 - g. Differentiable in query, key, value and key_weights.

    Args:
        query, key, value: as in ``weighted_attention``, packed or not.
        key_weights: [n, B, Lk], n >= 1, >= 0, the query's dtype or float32.
        causal, key_lengths, scale: as in ``weighted_attention``.

    Returns:
        [n, B, H, Lq, d] in the query's dtype.
    """
    check = Arguments("branched_attention")
    query, key, value = check_attention(check, query, key, value, key_lengths)
    check.floating("key_weights", key_weights, "n B Lk", own_dtype=True)
    if key_weights.size(0) == 0:
        raise ValueError(f"branched_attention: key_weights must hold a branch, got shape {list(key_weights.shape)}")
    causal = check.flag("causal", causal)
    scale = query.size(-1) ** -0.5 if scale is None else finite(check, "scale", scale)
    query, key, value = for_backend("branched_attention", query, key, value)
    arguments = (query, key, value, key_weights, causal, key_lengths, scale)
    return cast(Tensor, run("branched_attention", query, *arguments))
