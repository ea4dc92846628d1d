from __future__ import annotations

from torch import Tensor

from cnm_kernels.checks import Arguments
from cnm_kernels.ops.gaussian_mask import gaussian_mask


def negative_gaussian_masks(
    center: Tensor, width: Tensor, length: int, *, sigma: float, growth: float | Tensor
) -> tuple[Tensor, Tensor]:
    """CPL's easy negatives: Gaussians in what a proposal leaves free on its left and on its right.

    left = growth / 2 max(center - width / 2, 0) is center and width of the one, right = growth / 2 max(1 - center -
    width / 2, 0) the width of the other, centered at 1 - right; both as ``gaussian_mask`` with ``sigma`` / 2.
    Differentiable in center and width. Source: published CPL, ``negative_proposal_mining``.

    Args:
        center, width, length, sigma: as in ``gaussian_mask``, of the positive.
        growth: how far the negatives have grown, in [0, 1] (published: min(epoch / max_epoch, 1) ** gamma); or a
            tensor [] of that, for a CUDA graph to read anew.

    Returns:
        (left, right), [..., length] each in the dtype of ``center``.
    """
    check = Arguments("negative_gaussian_masks")
    check.floating("center", center, "...")
    check.floating("width", width, "...")
    if isinstance(growth, Tensor):
        check.floating("growth", growth, "", own_dtype=True)
    else:
        check.number("growth", growth, 0, 1)
    left = (center - width / 2).clamp(min=0) * (growth / 2)
    right = (1 - center - width / 2).clamp(min=0) * (growth / 2)
    return (
        gaussian_mask(left, left, length, sigma=sigma / 2),
        gaussian_mask(1 - right, right, length, sigma=sigma / 2),
    )
