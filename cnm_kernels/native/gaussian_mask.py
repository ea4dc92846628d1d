"""gaussian_mask in C++."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cnm_kernels.native.library import empty_like, register_autograd, register_fake

_forward = torch.ops.cnm_kernels.gaussian_mask.default
_backward = torch.ops.cnm_kernels.gaussian_mask_backward.default


def gaussian_mask(
    center: Tensor, width: Tensor, length: int, alpha: float, min_width: float, complement: bool
) -> Tensor:
    return _forward(center, width, length, alpha, min_width, complement)


def _fake(center: Tensor, width: Tensor, length: int, alpha: float, min_width: float, complement: bool) -> Tensor:
    return center.new_empty((*center.shape, length))


def _fake_backward(d_out: Tensor, center: Tensor, width: Tensor, *numbers: Any) -> tuple[Tensor, Tensor]:
    return empty_like(center), empty_like(width)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    center, width, _, *ctx.numbers = inputs
    ctx.save_for_backward(center, width)


def _differentiate(ctx: Any, d_out: Tensor | None) -> tuple[Tensor | None, ...]:
    if d_out is None:
        return (None,) * 6
    d_center, d_width = _backward(d_out, *ctx.saved_tensors, *ctx.numbers)
    return d_center, d_width, None, None, None, None


register_fake("gaussian_mask", _fake)
register_fake("gaussian_mask_backward", _fake_backward)
register_autograd("gaussian_mask", _save, _differentiate)
