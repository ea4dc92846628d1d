from __future__ import annotations

from typing import cast

from torch import Tensor

from cnm_kernels.checks import Arguments
from cnm_kernels.constants import MIN_WIDTH
from cnm_kernels.ops._call import run
from cnm_kernels.ops._checks import check_attention, check_gaussian, finite, for_backend


def gaussian_attention(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    center: Tensor,
    width: Tensor,
    *,
    alpha: float,
    min_width: float = MIN_WIDTH,
    complement: bool = False,
    causal: bool = False,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """``weighted_attention`` whose key weight is ``gaussian_mask(center, width, Lk)``, without the mask in memory.

    Differentiable in query, key, value, center and width. Source: CNM eq. 5.

    Args:
        query, key, value: as in ``weighted_attention``, packed or not.
        center, width: [B] or, for K proposals of each of B / K sentences, [B / K, K]; fraction of the video, the
            query's dtype or float32.
        alpha, min_width, complement: as in ``gaussian_mask``.
        causal, key_lengths, scale: as in ``weighted_attention``.

    Returns:
        [B, H, Lq, d] in the query's dtype.
    """
    check = Arguments("gaussian_attention")
    query, key, value = check_attention(check, query, key, value, key_lengths)
    if isinstance(center, Tensor) and isinstance(width, Tensor) and center.shape == width.shape and center.dim() == 2:
        center, width = center.flatten(), width.flatten()
    check.floating("center", center, "B", own_dtype=True)
    check.floating("width", width, "B", own_dtype=True)
    check_gaussian(check, alpha, min_width)
    causal = check.flag("causal", causal)
    scale = query.size(-1) ** -0.5 if scale is None else finite(check, "scale", scale)
    gaussian = (center, width, alpha, min_width, check.flag("complement", complement))
    query, key, value = for_backend("gaussian_attention", query, key, value)
    arguments = (query, key, value, *gaussian, causal, key_lengths, scale)
    return cast(Tensor, run("gaussian_attention", query, *arguments))
