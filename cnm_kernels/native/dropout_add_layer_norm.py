"""dropout_add_layer_norm in C++."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cnm_kernels.native.library import empty_like, register_autograd, register_fake

_forward = torch.ops.cnm_kernels.dropout_add_layer_norm.default
_backward = torch.ops.cnm_kernels.dropout_add_layer_norm_backward.default


def dropout_add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, p: float, seed: Tensor, offset: int, eps: float
) -> Tensor:
    return _forward(x, residual, weight, bias, p, seed, offset, eps)[0]


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
    need_x: bool,
    need_residual: bool,
    need_weights: bool,
) -> tuple[Tensor, ...]:
    inputs = [empty_like(x) if needed else x.new_empty(0) for needed in (need_x, need_residual)]
    return (*inputs, *(weight.new_empty(weight.shape if need_weights else 0) for _ in range(2)))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, residual, weight, _, ctx.p, seed, ctx.offset, _ = inputs
    ctx.save_for_backward(x, residual, weight, output[1], seed)


def _differentiate(ctx: Any, d_out: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if d_out is None:
        return (None,) * 8
    x, residual, weight, stats, seed = ctx.saved_tensors
    need_x, need_residual, need_weight, need_bias, *_ = ctx.needs_input_grad
    shared = ctx.p == 0  # both inputs then have the same gradient
    d_x, d_residual, d_weight, d_bias = _backward(
        d_out,
        x,
        residual,
        weight,
        stats,
        ctx.p,
        seed,
        ctx.offset,
        need_x and not shared,
        need_residual or (need_x and shared),
        need_weight or need_bias,
    )
    gradients = (d_residual if shared else d_x, d_residual, d_weight, d_bias)
    wanted = (d if needed else None for d, needed in zip(gradients, ctx.needs_input_grad[:4], strict=True))
    return (*wanted, None, None, None, None)


register_fake("dropout_add_layer_norm", _fake)
register_fake("dropout_add_layer_norm_backward", _fake_backward)
register_autograd("dropout_add_layer_norm", _save, _differentiate, not_differentiable=(1,))
