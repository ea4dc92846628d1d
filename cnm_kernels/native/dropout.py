"""dropout in C++: the gradient is the same op, which draws the mask again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cnm_kernels.native.library import empty_like, register_autograd, register_fake

_forward = torch.ops.cnm_kernels.dropout.default


def dropout(x: Tensor, p: float, seed: Tensor, offset: int) -> Tensor:
    return x if p == 0 else _forward(x, p, seed, offset)


def _fake(x: Tensor, p: float, seed: Tensor, offset: int) -> Tensor:
    return empty_like(x)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.p, seed, ctx.offset = inputs
    ctx.save_for_backward(seed)


def _differentiate(ctx: Any, d_out: Tensor | None) -> tuple[Tensor | None, ...]:
    d_x = None if d_out is None else _forward(d_out, ctx.p, *ctx.saved_tensors, ctx.offset)
    return d_x, None, None, None


register_fake("dropout", _fake)
register_autograd("dropout", _save, _differentiate)
