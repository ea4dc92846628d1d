"""intra_video_contrastive_loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cnm_kernels.autograd.operator import Operator, empty_like


def _fake(positive: Tensor, *others: Any) -> Tensor:
    return positive.new_empty((), dtype=torch.float32)


def _fake_backward(d_loss: Tensor, positive: Tensor, hard: Tensor, easy: Tensor, *betas: float) -> tuple[Tensor, ...]:
    return empty_like(positive), empty_like(hard), empty_like(easy)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *nlls, ctx.beta_1, ctx.beta_2 = inputs
    ctx.save_for_backward(*nlls)


def register(namespace: str) -> Callable[..., Any]:
    """The op on the operators of this namespace."""
    operator = Operator(namespace, "intra_video_contrastive_loss")

    def intra_video_contrastive_loss(
        positive: Tensor, hard: Tensor, easy: Tensor, beta_1: float, beta_2: float
    ) -> Tensor:
        return operator.forward(positive, hard, easy, beta_1, beta_2)

    def backward(ctx: Any, d_loss: Tensor | None) -> tuple[Tensor | None, ...]:
        if d_loss is None:
            return (None,) * 5
        return (*operator.backward(d_loss, *ctx.saved_tensors, ctx.beta_1, ctx.beta_2), None, None)

    operator.register_fake(_fake, _fake_backward)
    operator.register_autograd(setup_context, backward)
    return intra_video_contrastive_loss
