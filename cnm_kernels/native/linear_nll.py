"""linear_nll in C++, and contrastive_reconstruction_loss upon it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cnm_kernels.native.intra_video_contrastive_loss import intra_video_contrastive_loss
from cnm_kernels.native.library import empty_like, register_autograd, register_fake

# Where the layer itself is not trained, softmax(z) W of every token is kept for the backward, which then computes no
# logits: two products instead of three. It takes the memory of a quarter of the float32 logits at most.
EXPECTED_WORD_SHARE = 4

_forward = torch.ops.cnm_kernels.linear_nll.default
_backward = torch.ops.cnm_kernels.linear_nll_backward.default


def linear_nll(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    valid_lengths: Tensor,
    label_smoothing: float,
    return_accuracy: bool,
) -> tuple[Tensor, Tensor | None]:
    small = weight.size(0) >= EXPECTED_WORD_SHARE * weight.size(1)
    frozen = not (weight.requires_grad or bias.requires_grad)
    keep_expected = small and frozen and hidden.requires_grad and torch.is_grad_enabled()
    nll, accuracy, _, _ = _forward(
        hidden, weight, bias, target, valid_lengths, label_smoothing, return_accuracy, keep_expected
    )
    return nll, accuracy if return_accuracy else None


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
    nll = nll.view(3, -1)
    return intra_video_contrastive_loss(nll[0], nll[1], nll[2], beta_1, beta_2), nll


def _fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    valid_lengths: Tensor,
    label_smoothing: float,
    return_accuracy: bool,
    keep_expected: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    M, L, D = hidden.shape

    def floats(*shape: int) -> Tensor:
        return hidden.new_empty(shape, dtype=torch.float32)

    accuracy = floats(M if return_accuracy else 0)
    return floats(M), accuracy, floats(M, L), floats(M, L, D) if keep_expected else floats(0)


def _fake_backward(d_nll: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, *others: Any) -> tuple[Tensor, ...]:
    pairs = zip((hidden, weight, bias), others[-3:], strict=True)
    return tuple(empty_like(tensor) if needed else tensor.new_empty(0) for tensor, needed in pairs)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.label_smoothing, _, _ = inputs
    ctx.save_for_backward(*tensors, *output[2:])


def _differentiate(ctx: Any, d_nll: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if d_nll is None:
        return (None,) * 8
    *tensors, lse, expected = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    gradients = _backward(d_nll, *tensors, ctx.label_smoothing, lse, expected, *needs)
    return (*(d if needed else None for d, needed in zip(gradients, needs, strict=True)), *(None,) * 5)


register_fake("linear_nll", _fake)
register_fake("linear_nll_backward", _fake_backward)
register_autograd("linear_nll", _save, _differentiate, not_differentiable=[1, 2, 3])
