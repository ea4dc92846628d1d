"""linear in C++."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cnm_kernels.native.library import empty_like, register_autograd, register_fake

_forward = torch.ops.cnm_kernels.linear.default
_backward = torch.ops.cnm_kernels.linear_backward.default


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    return _forward(x, weight, bias, relu)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.size(0)))


def _fake_backward(
    d_out: Tensor, x: Tensor, weight: Tensor, out: Tensor | None, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, ...]:
    d_x = empty_like(x) if need_x else x.new_empty(0)
    d_weight = empty_like(weight) if need_weight else weight.new_empty(0)
    return d_x, d_weight, weight.new_empty(weight.size(0) if need_bias else 0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, relu = inputs
    ctx.save_for_backward(x, weight, output if relu else None)


def _differentiate(ctx: Any, d_out: Tensor | None) -> tuple[Tensor | None, ...]:
    if d_out is None:
        return (None,) * 4
    needs = ctx.needs_input_grad[:3]
    gradients = _backward(d_out, *ctx.saved_tensors, *needs)
    return (*(d if needed else None for d, needed in zip(gradients, needs, strict=True)), None)


register_fake("linear", _fake)
register_fake("linear_backward", _fake_backward)
register_autograd("linear", _save, _differentiate)
