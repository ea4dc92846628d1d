"""branched_attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cnm_kernels.autograd.attention import heads_last, operand_gradients, sizes
from cnm_kernels.autograd.operator import Operator


def out_like(query: Tensor, n: int, B: int, H: int, L: int, d: int) -> Tensor:
    """[n, B, H, L, d] in memory as [n, B, L, H, d]."""
    return heads_last(query, n * B, H, L, d).unflatten(0, (n, B))


def _fake(
    query: Tensor, key: Tensor | None, value: Tensor | None, key_weights: Tensor, *others: Any
) -> tuple[Tensor, Tensor]:
    B, H, Lq, _, d = sizes(query, key, value)
    n = key_weights.size(0)
    return out_like(query, n, B, H, Lq, d), query.new_empty(n, B, H, Lq, 2, dtype=torch.float32)


def _fake_backward(
    d_out: Tensor, query: Tensor, key: Tensor | None, value: Tensor | None, key_weights: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    *needs, need_weights = others[-4:]
    d_weights = key_weights.new_empty(key_weights.shape if need_weights else 0)
    return (*operand_gradients(query, key, value, needs), d_weights)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.causal, key_lengths, ctx.scale = inputs
    ctx.save_for_backward(*tensors, key_lengths, output[1])


def register(namespace: str) -> Callable[..., Any]:
    """The op on the operators of this namespace."""
    operator = Operator(namespace, "branched_attention")

    def branched_attention(*arguments: Any) -> Tensor:
        return operator.forward(*arguments)[0]

    def backward(ctx: Any, d_out: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if d_out is None:
            return (None,) * 7
        *tensors, key_lengths, stats = ctx.saved_tensors
        needs = ctx.needs_input_grad[:4]
        gradients = operator.backward(d_out, *tensors, ctx.causal, key_lengths, ctx.scale, stats, *needs)
        return (*(d if needed else None for d, needed in zip(gradients, needs, strict=True)), *(None,) * 3)

    operator.register_fake(_fake, _fake_backward)
    operator.register_autograd(setup_context, backward, not_differentiable=[1])
    branched_attention.takes_packed_heads = True  # type: ignore[attr-defined]
    return branched_attention
