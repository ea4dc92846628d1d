"""dropout_add_layer_norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cnm_kernels.autograd.operator import Operator, empty_like


def _fake(x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return empty_like(x), x.new_empty((*x.shape[:-1], 2), dtype=torch.float32)


def _fake_backward(
    d_out: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    stats: Tensor,
    p: float,
    seed: Tensor,
    offset: int,
    sample_indices: Tensor | None,
    need_x: bool,
    need_residual: bool,
    need_weights: bool,
) -> tuple[Tensor, ...]:
    inputs = [empty_like(x) if needed else x.new_empty(0) for needed in (need_x, need_residual)]
    return (*inputs, *(weight.new_empty(weight.shape if need_weights else 0) for _ in range(2)))


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, residual, weight, _, ctx.p, seed, ctx.offset, _, sample_indices = inputs
    ctx.save_for_backward(x, residual, weight, output[1], seed, sample_indices)


def register(namespace: str) -> Callable[..., Any]:
    """The op on the operators of this namespace."""
    operator = Operator(namespace, "dropout_add_layer_norm")

    def dropout_add_layer_norm(
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        bias: Tensor,
        p: float,
        seed: Tensor,
        offset: int,
        eps: float,
        sample_indices: Tensor | None = None,
    ) -> Tensor:
        return operator.forward(x, residual, weight, bias, p, seed, offset, eps, sample_indices)[0]

    def backward(ctx: Any, d_out: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if d_out is None:
            return (None,) * 9
        x, residual, weight, stats, seed, sample_indices = ctx.saved_tensors
        need_x, need_residual, need_weight, need_bias, *_ = ctx.needs_input_grad
        shared = ctx.p == 0  # both inputs then have the same gradient
        d_x, d_residual, d_weight, d_bias = operator.backward(
            d_out,
            x,
            residual,
            weight,
            stats,
            ctx.p,
            seed,
            ctx.offset,
            sample_indices,
            need_x and not shared,
            need_residual or (need_x and shared),
            need_weight or need_bias,
        )
        gradients = (d_residual if shared else d_x, d_residual, d_weight, d_bias)
        wanted = (d if needed else None for d, needed in zip(gradients, ctx.needs_input_grad[:4], strict=True))
        return (*wanted, *[None] * 5)

    operator.register_fake(_fake, _fake_backward)
    operator.register_autograd(setup_context, backward, not_differentiable=[1])
    return dropout_add_layer_norm
