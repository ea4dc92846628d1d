"""Registration of one operator's Python side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class _OnlyOnce(torch.autograd.Function):
    """The identity, standing behind a gradient: differentiating it would need a second derivative."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, op: str) -> Tensor:
        ctx.op = op
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise NotImplementedError(f"cnm_kernels::{ctx.op} is differentiable once; its gradient is not")


def register_fake(op: str, function: Callable[..., Any]) -> None:
    """``function`` gives empty tensors of the op's output shapes and dtypes."""
    torch.library.register_fake(f"cnm_kernels::{op}", function)


def register_autograd(
    op: str, setup_context: Callable[..., None], backward: Callable[..., Any], not_differentiable: Sequence[int] = ()
) -> None:
    """``setup_context(ctx, inputs, output)`` saves what ``backward(ctx, *d_outputs)`` reads; as in torch.library.

    Outputs ``not_differentiable`` are there for the backward alone. Upstream gradients that are zero come as None. A
    second derivative is refused aloud.
    """

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        if not_differentiable:
            ctx.mark_non_differentiable(*(output[i] for i in not_differentiable))
        setup_context(ctx, inputs, output)

    def differentiate(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            gradients = backward(ctx, *d_outputs)
        if not torch.is_grad_enabled():  # nobody will differentiate these again
            return gradients
        return tuple(d if d is None else _OnlyOnce.apply(d.detach().requires_grad_(), op) for d in gradients)

    torch.library.register_autograd(f"cnm_kernels::{op}", differentiate, setup_context=setup)


def empty_like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """As the kernels allocate: the same shape, contiguous."""
    return tensor.new_empty(tensor.shape, dtype=dtype)
