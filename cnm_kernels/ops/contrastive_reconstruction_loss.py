from __future__ import annotations

from torch import Tensor

from cnm_kernels.checks import Arguments
from cnm_kernels.constants import BETA_1, BETA_2, LABEL_SMOOTHING
from cnm_kernels.ops._call import autocast, autocast_bias, run
from cnm_kernels.ops._checks import check_vocabulary, finite
from cnm_kernels.parameter_uses import use


def contrastive_reconstruction_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    valid_lengths: Tensor,
    *,
    label_smoothing: float = LABEL_SMOOTHING,
    beta_1: float = BETA_1,
    beta_2: float = BETA_2,
) -> tuple[Tensor, Tensor]:
    """``linear_nll`` of the three branches and ``intra_video_contrastive_loss`` of the result, in one call.

    Args:
        hidden: [3, B, L, D]: positive, hard negative, easy negative.
        weight: [V, D], bias: [V], the dtype of ``hidden`` or float32; their gradients come in their own.
        target: [B, L] int64, valid_lengths: [B] int64, shared by the branches; as in ``linear_nll``.
        label_smoothing, beta_1, beta_2: as in the two ops.

    Returns:
        (loss [], nll [3, B]), float32 (float64 for float64); both differentiable in hidden, weight and bias.
    """
    check = Arguments("contrastive_reconstruction_loss")
    hidden, weight = autocast(hidden, weight)
    bias = autocast_bias(bias, hidden)
    check.floating("hidden", hidden, "3 B L D")
    check_vocabulary(check, weight, bias, label_smoothing)
    check.integer("target", target, "B L")
    check.integer("valid_lengths", valid_lengths, "B")
    margins = finite(check, "beta_1", beta_1), finite(check, "beta_2", beta_2)
    arguments = (hidden, use(weight), use(bias), target, valid_lengths, label_smoothing, *margins)
    return run("contrastive_reconstruction_loss", hidden, *arguments)
