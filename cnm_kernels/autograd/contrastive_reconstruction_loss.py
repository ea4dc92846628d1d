"""contrastive_reconstruction_loss: ``linear_nll`` of the branches as one batch, and the loss of the three."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


def compose(functions: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """The op upon those of ``functions``, by op."""
    linear_nll, intra_video_contrastive_loss = functions["linear_nll"], functions["intra_video_contrastive_loss"]

    def contrastive_reconstruction_loss(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        target: Tensor,
        valid_lengths: Tensor,
        label_smoothing: float,
        beta_1: float,
        beta_2: float,
    ) -> tuple[Tensor, Tensor]:
        targets, lengths = target.repeat(3, 1), valid_lengths.repeat(3)
        nll, _ = linear_nll(hidden.flatten(0, 1), weight, bias, targets, lengths, label_smoothing, False)
        nll = nll.view(3, nll.size(0) // 3)
        return intra_video_contrastive_loss(nll[0], nll[1], nll[2], beta_1, beta_2), nll

    return contrastive_reconstruction_loss
