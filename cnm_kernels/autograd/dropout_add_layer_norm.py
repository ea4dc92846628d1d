"""dropout_add_layer_norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from cnm_kernels.autograd.operator import Operator, empty_like, savable


def _fake(x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return empty_like(x), x.new_empty((*x.shape[:-1], 2), dtype=torch.float32)


def _fake_backward(
    d_out: Tensor,
    d_again: Tensor | None,
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
    d_weight = weight.new_empty(weight.shape if need_weights else 0)
    return (*inputs, d_weight, torch.empty_like(d_weight, dtype=torch.float32))


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, residual, weight, bias, ctx.p, seed, ctx.offset, _, sample_indices = inputs
    ctx.bias_dtype = bias.dtype
    ctx.save_for_backward(x, residual, weight, output[1], seed, sample_indices)


def _transformed() -> bool:
    """Whether ``torch.compile``, ``torch.func`` or forward mode wants operators only, to treat them as they do others.

    Two uses of an operator's output add their gradients; forward mode is refused in the operator's words.
    """
    transformed = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return transformed or forward_ad._current_level >= 0


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
        twice: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        inputs = (x, residual, weight, bias, p, seed, offset, eps, sample_indices)
        if twice and torch.is_grad_enabled() and not _transformed():
            first, second = Twice.apply(*inputs)
            return first, second
        out: Tensor = operator.forward(*inputs)[0]
        return (out, out) if twice else out

    def backward(ctx: Any, d_out: Tensor | None, d_again: Tensor | None = None) -> tuple[Tensor | None, ...]:
        if d_out is None:
            d_out, d_again = d_again, None
        if d_out is None:
            return (None,) * 9
        x, residual, weight, stats, seed, sample_indices = ctx.saved_tensors
        need_x, need_residual, need_weight, need_bias, *_ = ctx.needs_input_grad
        shared = ctx.p == 0  # both inputs then have the same gradient
        d_x, d_residual, d_weight, d_bias = operator.backward(
            d_out,
            d_again,
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
        gradients = (d_residual if shared else d_x, d_residual, d_weight, d_bias.to(ctx.bias_dtype))
        wanted = (d if needed else None for d, needed in zip(gradients, ctx.needs_input_grad[:4], strict=True))
        return (*wanted, *[None] * 5)

    class Twice(torch.autograd.Function):
        """The result as two outputs, whose gradients the backward takes apart. An operator's outputs may not share
        memory, so this is none."""

        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
            output = operator.forward(*inputs)
            ctx.set_materialize_grads(False)
            setup_context(ctx, savable(inputs), output)
            return output[0], output[0].view_as(output[0])

        @staticmethod
        def backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
            return backward(ctx, *d_outputs)

    operator.register_fake(_fake, _fake_backward)
    operator.register_autograd(setup_context, backward, not_differentiable=[1])
    return dropout_add_layer_norm
