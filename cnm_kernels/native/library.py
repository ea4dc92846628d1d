"""Registration of one operator's Python side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


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

    torch.library.register_autograd(f"cnm_kernels::{op}", once_differentiable(backward), setup_context=setup)


def empty_like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """As the kernels allocate: the same shape, contiguous."""
    return tensor.new_empty(tensor.shape, dtype=dtype)
