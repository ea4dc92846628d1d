from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from cnm_kernels.checks import Arguments
from cnm_kernels.constants import LABEL_SMOOTHING
from cnm_kernels.ops._call import autocast, autocast_bias, run
from cnm_kernels.ops._checks import check_vocabulary
from cnm_kernels.parameter_uses import use


@overload
def linear_nll(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    valid_lengths: Tensor,
    *,
    label_smoothing: float = ...,
    return_accuracy: Literal[False] = ...,
) -> Tensor: ...


@overload
def linear_nll(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    valid_lengths: Tensor,
    *,
    label_smoothing: float = ...,
    return_accuracy: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def linear_nll(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    valid_lengths: Tensor,
    *,
    label_smoothing: float = LABEL_SMOOTHING,
    return_accuracy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Label-smoothed negative log likelihood of a linear layer over the vocabulary, averaged per row.

    Per token (1-e)(lse - z_y) + e (lse - mean_v z_v) with z = hidden W^T + b; averaged over the first
    ``valid_lengths[m]`` tokens of row m (a length beyond L counts as L; a row of length 0 has nll 0 and no gradient).
    Differentiable in hidden, weight and bias. Source: published ``cal_nll_loss`` on ``fc_rec``.

    Args:
        hidden: [M, L, D].
        weight: [V, D], bias: [V], the dtype of ``hidden`` or float32; their gradients come in their own.
        target: [M, L] int64 in [0, V); not read beyond the row's length.
        valid_lengths: [M] int64.
        label_smoothing: e, in [0, 1].
        return_accuracy: also return the share of valid tokens whose most likely word is the target.

    Returns:
        nll [M], float32 (float64 for float64); with ``return_accuracy`` the pair (nll, accuracy [M]).
    """
    check = Arguments("linear_nll")
    hidden, weight = autocast(hidden, weight)
    bias = autocast_bias(bias, hidden)
    check.floating("hidden", hidden, "M L D")
    check_vocabulary(check, weight, bias, label_smoothing)
    check.integer("target", target, "M L")
    check.integer("valid_lengths", valid_lengths, "M")
    return_accuracy = check.flag("return_accuracy", return_accuracy)
    arguments = (hidden, use(weight), use(bias), target, valid_lengths, label_smoothing, return_accuracy)
    nll, accuracy = run("linear_nll", hidden, *arguments)
    return (nll, accuracy) if return_accuracy else nll
