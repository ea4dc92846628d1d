"""linear_nll."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cnm_kernels.autograd.operator import Operator, empty_like


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
    return floats(M), accuracy, floats(2, M, L), floats(M, L, D) if keep_expected else floats(0)


def _fake_backward(d_nll: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, *others: Any) -> tuple[Tensor, ...]:
    pairs = zip((hidden, weight, bias), others[-3:], strict=True)
    return tuple(empty_like(tensor) if needed else tensor.new_empty(0) for tensor, needed in pairs)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.label_smoothing, _, _ = inputs
    ctx.save_for_backward(*tensors, *output[2:])


def register(namespace: str, keeps_expected: Callable[[Tensor, Tensor, Tensor], bool]) -> Callable[..., Any]:
    """The op on the operators of this namespace.

    ``keeps_expected(hidden, weight, bias)`` says whether softmax(z) W of every token is worth keeping for a backward to
    ``hidden``, which then computes no logits.
    """
    operator = Operator(namespace, "linear_nll")

    def linear_nll(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        target: Tensor,
        valid_lengths: Tensor,
        label_smoothing: float,
        return_accuracy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        # A tensor batched by torch.func does not tell whether what it holds wants a gradient.
        wanted = hidden.requires_grad or torch._C._are_functorch_transforms_active()
        keep_expected = wanted and torch.is_grad_enabled() and keeps_expected(hidden, weight, bias)
        nll, accuracy, _, _ = operator.forward(
            hidden, weight, bias, target, valid_lengths, label_smoothing, return_accuracy, keep_expected
        )
        return nll, accuracy if return_accuracy else None

    def backward(ctx: Any, d_nll: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if d_nll is None:
            return (None,) * 8
        *tensors, stats, expected = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        gradients = operator.backward(d_nll, *tensors, ctx.label_smoothing, stats, expected, *needs)
        return (*(d if needed else None for d, needed in zip(gradients, needs, strict=True)), *(None,) * 5)

    operator.register_fake(_fake, _fake_backward)
    operator.register_autograd(setup_context, backward, not_differentiable=[1, 2, 3])
    return linear_nll
