"""weighted_attention, gaussian_attention, attention_weights: one operator; keys weigh by a tensor, a Gaussian or alike.

It takes heads packed as a projection gives them, and hands their gradients back packed: nothing is copied together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cnm_kernels.autograd.operator import Operator


def sizes(query: Tensor, key: Tensor | None, value: Tensor | None) -> tuple[int, int, int, int, int]:
    """B, H, Lq, Lk, d."""
    if key is None:
        B, L, _, H, d = query.shape
        return B, H, L, L, d
    B, H, Lq, d = query.shape
    return B, H, Lq, key.size(1 if value is None else 2), d


def unpack(query: Tensor, key: Tensor | None, value: Tensor | None) -> list[Tensor]:
    """query, key and value as views [B, H, L, d] of what may come packed."""
    if key is None:
        return list(query.permute(2, 0, 3, 1, 4).unbind(0))
    if value is None:
        return [query, *key.permute(2, 0, 3, 1, 4).unbind(0)]
    return [query, key, value]


def heads_last(like: Tensor, B: int, H: int, L: int, d: int) -> Tensor:
    """[B, H, L, d] in memory as [B, L, H, d], as the kernels write it."""
    return like.new_empty(B, L, H, d).transpose(1, 2)


def operand_gradients(query: Tensor, key: Tensor | None, value: Tensor | None, needs: Sequence[bool]) -> list[Tensor]:
    """Allocates the gradients of query, key and value, packed as these are; an empty one if it is not needed."""

    def gradient(operand: Tensor | None, needed: bool) -> Tensor:
        if operand is None or not needed:
            return query.new_empty(0)
        if operand.dim() == 5:
            return operand.new_empty(operand.shape)
        B, H, L, d = operand.shape
        return heads_last(operand, B, H, L, d)

    return list(map(gradient, (query, key, value), needs))


def _fake(query: Tensor, key: Tensor | None, value: Tensor | None, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return_weights = others[-1]
    B, H, Lq, Lk, d = sizes(query, key, value)
    stats = query.new_empty(B, H, Lq, 2, dtype=torch.float32)
    weights = query.new_empty((B, Lq, Lk) if return_weights else (0,))
    return heads_last(query, B, H, Lq, d), stats, weights


def _fake_backward(
    d_out: Tensor, d_weights: Tensor | None, query: Tensor, key: Tensor | None, value: Tensor | None, *others: Any
) -> tuple[Tensor, ...]:
    weighting = others[:3]  # key_weight, center, width
    *needs, need_weight = others[-4:]

    def like(tensor: Tensor | None) -> Tensor:
        if tensor is None:
            return query.new_empty(0, dtype=torch.float32)
        return tensor.new_empty(tensor.shape if need_weight else 0)

    return (*operand_gradients(query, key, value, needs), *map(like, weighting))


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, alpha, min_width, complement, causal, key_lengths, scale, ctx.return_weights = inputs
    ctx.save_for_backward(*tensors, key_lengths, output[1])
    ctx.numbers = alpha, min_width, complement, causal
    ctx.scale = scale


def register(namespace: str) -> tuple[Callable[..., Any], ...]:
    """The ops on the operators of this namespace."""
    operator = Operator(namespace, "attention")

    def weighted_attention(
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        key_weight: Tensor | None,
        causal: bool,
        key_lengths: Tensor | None,
        scale: float,
    ) -> Tensor:
        none = (None, None, 1.0, 1.0, False)
        return operator.forward(query, key, value, key_weight, *none, causal, key_lengths, scale, False)[0]

    def gaussian_attention(
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        center: Tensor,
        width: Tensor,
        alpha: float,
        min_width: float,
        complement: bool,
        causal: bool,
        key_lengths: Tensor | None,
        scale: float,
    ) -> Tensor:
        gaussian = (center, width, alpha, min_width, complement)
        return operator.forward(query, key, value, None, *gaussian, causal, key_lengths, scale, False)[0]

    def attention_weights(
        query: Tensor,
        key: Tensor,
        key_weight: Tensor | None,
        causal: bool,
        key_lengths: Tensor | None,
        scale: float,
    ) -> Tensor:
        none = (None, None, 1.0, 1.0, False)  # the kernels want values too: the keys serve
        return operator.forward(query, key, key.detach(), key_weight, *none, causal, key_lengths, scale, True)[2]

    def backward(ctx: Any, d_out: Tensor | None, _stats: None, d_weights: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, key_lengths, stats = ctx.saved_tensors
        if not ctx.return_weights:
            d_weights = None
        if d_out is None:
            if d_weights is None:
                return (None,) * 13
            B, H, Lq, _, d = sizes(*tensors[:3])
            d_out = heads_last(tensors[0], B, H, Lq, d).zero_()
        needs = ctx.needs_input_grad[:6]
        gradients = operator.backward(
            d_out, d_weights, *tensors, *ctx.numbers, key_lengths, ctx.scale, stats, *needs[:3], any(needs[3:])
        )
        return (*(d if needed else None for d, needed in zip(gradients, needs, strict=True)), *(None,) * 7)

    operator.register_fake(_fake, _fake_backward)
    operator.register_autograd(setup_context, backward, not_differentiable=[1])
    weighted_attention.takes_packed_heads = True  # type: ignore[attr-defined]
    gaussian_attention.takes_packed_heads = True  # type: ignore[attr-defined]
    return weighted_attention, gaussian_attention, attention_weights
