"""intra_video_contrastive_loss in C++."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cnm_kernels.native.library import empty_like, register_autograd, register_fake

_forward = torch.ops.cnm_kernels.intra_video_contrastive_loss.default
_backward = torch.ops.cnm_kernels.intra_video_contrastive_loss_backward.default


def intra_video_contrastive_loss(positive: Tensor, hard: Tensor, easy: Tensor, beta_1: float, beta_2: float) -> Tensor:
    return _forward(positive, hard, easy, beta_1, beta_2)


def _fake(positive: Tensor, *others: Any) -> Tensor:
    return positive.new_empty((), dtype=torch.float32)


def _fake_backward(d_loss: Tensor, positive: Tensor, hard: Tensor, easy: Tensor, *betas: float) -> tuple[Tensor, ...]:
    return empty_like(positive), empty_like(hard), empty_like(easy)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *nlls, ctx.beta_1, ctx.beta_2 = inputs
    ctx.save_for_backward(*nlls)


def _differentiate(ctx: Any, d_loss: Tensor | None) -> tuple[Tensor | None, ...]:
    if d_loss is None:
        return (None,) * 5
    return (*_backward(d_loss, *ctx.saved_tensors, ctx.beta_1, ctx.beta_2), None, None)


register_fake("intra_video_contrastive_loss", _fake)
register_fake("intra_video_contrastive_loss_backward", _fake_backward)
register_autograd("intra_video_contrastive_loss", _save, _differentiate)
