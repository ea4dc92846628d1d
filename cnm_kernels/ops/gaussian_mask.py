from __future__ import annotations

from torch import Tensor

from cnm_kernels.checks import Arguments
from cnm_kernels.constants import MIN_PROPOSAL_WIDTH, MIN_WIDTH
from cnm_kernels.ops._call import run
from cnm_kernels.ops._checks import MAX_SIGMA, check_gaussian


def gaussian_mask(
    center: Tensor,
    width: Tensor,
    length: int,
    *,
    alpha: float | None = None,
    sigma: float | None = None,
    min_width: float | None = None,
    complement: bool = False,
) -> Tensor:
    """A Gaussian over time, sampled at ``length`` equally spaced points of the video.

    With ``alpha``: g_j = exp(-alpha (x_j - center)^2 / max(width, min_width)^2), x = linspace(0, 1, length); a length
    of 1 has x = 0. With ``sigma``: the same Gaussian given by its standard deviation max(width, min_width) / sigma and
    divided by its largest sample, g_j / max_k g_k, whose gradient counts. The gradient to ``width`` is 0 below
    ``min_width`` and passes at equality, as ``torch.clamp`` does. Source: ``alpha``: CNM eq. 3 (published
    ``generate_gauss_weight``); ``sigma``: the function of that name in CPL, where [B, K] centers are K proposals.

    Args:
        center: [...], fraction of the video; may lie outside [0, 1].
        width: [...], fraction of the video.
        length: number of points, >= 0.
        alpha: sharpness (published: 5.5 Charades-STA, 5 ActivityNet).
        sigma: standard deviations in a width, > 0 (published: 9), instead of ``alpha``.
        min_width: widths below are clamped to it, > 0; default 0.1, with ``sigma`` 0.01, as published.
        complement: give 1 - g, the easy negative's weight.

    Returns:
        [..., length] in the dtype of ``center``.
    """
    check = Arguments("gaussian_mask")
    check.floating("center", center, "...")
    check.floating("width", width, "...")
    length = check.whole("length", length, 0, 1 << 31)
    complement = check.flag("complement", complement)
    if (alpha is None) == (sigma is None):
        raise ValueError(f"gaussian_mask: give either alpha or sigma, got alpha={alpha} and sigma={sigma}")
    if alpha is not None:
        min_width = MIN_WIDTH if min_width is None else min_width
        check_gaussian(check, alpha, min_width)
        return run("gaussian_mask", center, center, width, length, alpha, min_width, complement, False)
    assert sigma is not None
    min_width = MIN_PROPOSAL_WIDTH if min_width is None else min_width
    check.number("sigma", sigma, -float("inf"), float("inf"))
    if not 0 < sigma <= MAX_SIGMA:
        raise ValueError(f"gaussian_mask: sigma must be a number above 0, at most {MAX_SIGMA:g}, got {sigma}")
    alpha = sigma**2 / 2
    check_gaussian(check, alpha, min_width)
    min_width = max(min_width, 1e-15 * alpha**0.5)  # from here on down no number changes, but squares would overflow
    return run("gaussian_mask", center, center, width, length, alpha, min_width, complement, True)
