"""linear, and linear beside others that read its input."""

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
    d_x_added: Tensor | None,
    split: bool,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, ...]:
    columns = weight.size(-1)
    d_x = d_out.new_empty((*d_out.shape[:-1], columns) if need_x else 0)
    d_weight = empty_like(weight) if need_weight else weight.new_empty(0)
    return d_x, d_weight, weight.new_empty(weight.shape[:-1] if need_bias else 0)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, relu, lengths, ctx.split = inputs
    # x is read for the weight's gradient alone.
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, output if relu else None, lengths)


def register(namespace: str) -> Callable[..., Any]:
    """The op on the operators of this namespace."""
    operator = Operator(namespace, "linear")

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, lengths: Tensor | None) -> Tensor:
        if products.by_library(x, weight, lengths):
            return reference.linear(x, weight, bias, relu, lengths)
        return operator.forward(x, weight, bias, relu, lengths, products.split(x))

    def backward(ctx: Any, d_out: Tensor | None, d_x: Tensor | None = None) -> tuple[Tensor | None, ...]:
        if d_out is None:
            return (d_x, *(None,) * 5)
        needs = ctx.needs_input_grad[:3]
        gradients = operator.backward(d_out, *ctx.saved_tensors, d_x, ctx.split, *needs)
        return (*(d if needed else None for d, needed in zip(gradients, needs, strict=True)), None, None, None)

    class Beside(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
            out = operator.forward(*inputs)
            ctx.set_materialize_grads(False)
            setup_context(ctx, inputs, out)
            return out, inputs[0]

        @staticmethod
        def backward(ctx: Any, d_out: Tensor | None, d_x: Tensor | None) -> tuple[Tensor | None, ...]:
            return backward(ctx, d_out, d_x)

    def beside(
        x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """``linear``, and x for its other readers: the product that makes x's gradient adds theirs."""
        plain = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        differentiated = torch.is_grad_enabled() and x.requires_grad
        if plain or not differentiated or products.by_library(x, weight, lengths):
            return linear(x, weight, bias, relu, lengths), x
        out, passed = Beside.apply(x, weight, bias, relu, lengths, products.split(x))
        return out, passed

    operator.register_fake(_fake, _fake_backward)
    operator.register_autograd(setup_context, backward)
    linear.beside = beside  # type: ignore[attr-defined]
    return linear
