"""absorbed_attention: nothing but its inputs is kept for the backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cnm_kernels.autograd.attention import heads_last
from cnm_kernels.autograd.operator import Operator, empty_like


def _fake(query: Tensor, *others: Any) -> Tensor:
    return empty_like(query)


def _fake_backward(
    d_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    key_bias: Tensor | None,
    key_weight: Tensor | None,
    query_lengths: Tensor | None,
    key_lengths: Tensor | None,
    scale: float,
    need_query: bool,
    need_key: bool,
    need_value: bool,
    need_bias: bool,
    need_weight: bool,
) -> tuple[Tensor, ...]:
    def like_keys(needed: bool) -> Tensor:
        return heads_last(key, *key.shape) if needed else key.new_empty(0)

    def small(tensor: Tensor | None, needed: bool) -> Tensor:
        if tensor is None:
            return query.new_empty(0, dtype=torch.float32)
        return tensor.new_empty(tensor.shape if needed else 0)

    return (
        empty_like(query) if need_query else query.new_empty(0),
        like_keys(need_key),
        like_keys(need_value and value is not None),
        small(key_bias, need_bias),
        small(key_weight, need_weight),
    )


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def register(namespace: str) -> Callable[..., Any]:
    """The op on the operators of this namespace."""
    operator = Operator(namespace, "absorbed_attention")

    def absorbed_attention(*arguments: Any) -> Tensor:
        return operator.forward(*arguments)

    def backward(ctx: Any, d_out: Tensor | None) -> tuple[Tensor | None, ...]:
        if d_out is None:
            return (None,) * 8
        needs = ctx.needs_input_grad[:5]
        gradients = operator.backward(d_out, *ctx.saved_tensors, ctx.scale, *needs)
        return (*(d if needed else None for d, needed in zip(gradients, needs, strict=True)), *(None,) * 3)

    operator.register_fake(_fake, _fake_backward)
    operator.register_autograd(setup_context, backward)
    return absorbed_attention
