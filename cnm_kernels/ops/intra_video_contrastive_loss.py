from __future__ import annotations

from torch import Tensor

from cnm_kernels.checks import Arguments
from cnm_kernels.constants import BETA_1, BETA_2
from cnm_kernels.ops._call import run
from cnm_kernels.ops._checks import finite


def intra_video_contrastive_loss(
    positive: Tensor, hard: Tensor, easy: Tensor, *, beta_1: float = BETA_1, beta_2: float = BETA_2
) -> Tensor:
    """mean relu(positive - hard + beta_1) + mean relu(positive - easy + beta_2); the gradient at a kink is one half.

    Source: CNM eq. 11 (published ``ivc_loss``).

    Args:
        positive, hard, easy: nll of the three branches, [B] each.
        beta_1, beta_2: margins to the hard and the easy negative.

    Returns:
        Scalar, float32 (float64 for float64).
    """
    check = Arguments("intra_video_contrastive_loss")
    check.floating("positive", positive, "B")
    check.floating("hard", hard, "B")
    check.floating("easy", easy, "B")
    margins = finite(check, "beta_1", beta_1), finite(check, "beta_2", beta_2)
    return run("intra_video_contrastive_loss", positive, positive, hard, easy, *margins)
