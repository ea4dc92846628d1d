"""gaussian_mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from cnm_kernels.autograd.operator import Operator, empty_like


def _fake(center: Tensor, width: Tensor, length: int, *options: Any) -> Tensor:
    return center.new_empty((*center.shape, length))


def _fake_backward(d_out: Tensor, center: Tensor, width: Tensor, *numbers: Any) -> tuple[Tensor, Tensor]:
    return empty_like(center), empty_like(width)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    center, width, _, *ctx.numbers = inputs
    ctx.save_for_backward(center, width)


def register(namespace: str) -> Callable[..., Any]:
    """The op on the operators of this namespace."""
    operator = Operator(namespace, "gaussian_mask")

    def gaussian_mask(
        center: Tensor,
        width: Tensor,
        length: int,
        alpha: float,
        min_width: float,
        complement: bool,
        normalized: bool,
    ) -> Tensor:
        return operator.forward(center, width, length, alpha, min_width, complement, normalized)

    def backward(ctx: Any, d_out: Tensor | None) -> tuple[Tensor | None, ...]:
        if d_out is None:
            return (None,) * 7
        d_center, d_width = operator.backward(d_out, *ctx.saved_tensors, *ctx.numbers)
        return d_center, d_width, None, None, None, None, None

    operator.register_fake(_fake, _fake_backward)
    operator.register_autograd(setup_context, backward)
    return gaussian_mask
