"""dropout: the gradient is the same op, which draws the mask again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from cnm_kernels.autograd.operator import Operator, empty_like


def _fake(x: Tensor, p: float, seed: Tensor, offset: int) -> Tensor:
    return empty_like(x)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.p, seed, ctx.offset = inputs
    ctx.save_for_backward(seed)


def register(namespace: str) -> Callable[..., Any]:
    """The op on the operators of this namespace."""
    operator = Operator(namespace, "dropout")

    def dropout(x: Tensor, p: float, seed: Tensor, offset: int) -> Tensor:
        return x if p == 0 else operator.forward(x, p, seed, offset)

    def backward(ctx: Any, d_out: Tensor | None) -> tuple[Tensor | None, ...]:
        d_x = None if d_out is None else operator.forward(d_out, ctx.p, *ctx.saved_tensors, ctx.offset)
        return d_x, None, None, None

    operator.register_fake(_fake)
    operator.register_autograd(setup_context, backward)
    return dropout
