"""linear."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cnm_kernels import products, reference
from cnm_kernels.autograd.operator import Operator, empty_like


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, lengths: Tensor | None, split: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.size(-2)))


def _fake_backward(
    d_out: Tensor,
    x: Tensor | None,
    weight: Tensor,
    out: Tensor | None,
    lengths: Tensor | None,
    split: bool,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, ...]:
    columns = weight.size(-1)
    d_x = d_out.new_empty((*d_out.shape[:-1], columns) if need_x else 0)
    d_weight = empty_like(weight) if need_weight else weight.new_empty(0)
    return d_x, d_weight, weight.new_empty(weight.shape[:-1] if need_bias else 0, dtype=torch.float32)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, relu, lengths, ctx.split = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    # x is read for the weight's gradient alone.
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, output if relu else None, lengths)


def register(namespace: str) -> Callable[..., Any]:
    """The op on the operators of this namespace."""
    operator = Operator(namespace, "linear")

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, lengths: Tensor | None) -> Tensor:
        if products.by_library(x, weight, lengths):
            return reference.linear(x, weight, bias, relu, lengths)
        return operator.forward(x, weight, bias, relu, lengths, products.split(x))

    def backward(ctx: Any, d_out: Tensor | None) -> tuple[Tensor | None, ...]:
        if d_out is None:
            return (None,) * 6
        needs = ctx.needs_input_grad[:3]
        d_x, d_weight, d_bias = operator.backward(d_out, *ctx.saved_tensors, ctx.split, *needs)
        gradients = d_x, d_weight, d_bias.to(ctx.bias_dtype)
        return (*(d if needed else None for d, needed in zip(gradients, needs, strict=True)), None, None, None)

    operator.register_fake(_fake, _fake_backward)
    operator.register_autograd(setup_context, backward)
    return linear
