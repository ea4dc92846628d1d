from __future__ import annotations

import sys
from typing import Literal, overload

import torch
from torch import Tensor

from cnm_kernels.checks import Arguments
from cnm_kernels.constants import LAYER_NORM_EPS
from cnm_kernels.ops._call import run
from cnm_kernels.ops._checks import seed_tensor
from cnm_kernels.parameter_uses import use


@overload
def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    p: float,
    *,
    seed: int | Tensor,
    offset: int = ...,
    eps: float = ...,
    sample_indices: Tensor | None = ...,
    twice: Literal[False] = ...,
) -> Tensor: ...
@overload
def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    p: float,
    *,
    seed: int | Tensor,
    offset: int = ...,
    eps: float = ...,
    sample_indices: Tensor | None = ...,
    twice: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    p: float,
    *,
    seed: int | Tensor,
    offset: int = 0,
    eps: float = LAYER_NORM_EPS,
    sample_indices: Tensor | None = None,
    twice: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm(residual + dropout(x)) over the last dimension, the end of every transformer sublayer.

    Differentiable in x, residual, weight and bias.

    Args:
        x, residual: [..., D], one dtype. Where they differ, as under autocast, both run in the wider one.
        weight, bias: [D], the dtype of x or float32.
        p, seed, offset: as in ``dropout``; p = 0 draws nothing.
        eps: added to the variance.
        sample_indices: [B] int64, >= 0, for x [B, ..., D]: sample i drops what sample ``sample_indices[i]`` of a
            larger batch, of the same shape otherwise, would. None: each its own.
        twice: returns the result as two tensors of one memory, one for each of two users, such as the next sublayer and
            the sum after it: the backward adds their gradients where it reads them, not autograd in a pass of its own.
            Neither may be changed in place.

    Returns:
        [..., D] in the dtype of x (the wider one, where x and residual differ); with ``twice`` a pair of it.
    """
    floating = all(isinstance(t, Tensor) and t.is_floating_point() and t.layout == torch.strided for t in (x, residual))
    if floating and x.dtype != residual.dtype:
        dtype = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(dtype), residual.to(dtype)
    check = Arguments("dropout_add_layer_norm")
    check.floating("x", x, "... D")
    check.floating("residual", residual, "... D")
    check.floating("weight", weight, "D", own_dtype=True)
    check.floating("bias", bias, "D", own_dtype=True)
    check.number("p", p, 0, 1)
    offset = check.whole("offset", offset, -(1 << 63), (1 << 63) - 1)
    check.number("eps", eps, 0, sys.float_info.max)
    if sample_indices is not None:
        check.integer("sample_indices", sample_indices, "B")
        if x.dim() < 2 or x.size(0) != sample_indices.size(0):
            raise ValueError(
                f"dropout_add_layer_norm: sample_indices must hold an index for each sample of x {list(x.shape)}, got "
                f"{list(sample_indices.shape)}"
            )
    twice, seed = check.flag("twice", twice), seed_tensor(check, seed, x)
    return run(
        "dropout_add_layer_norm", x, x, residual, use(weight), use(bias), p, seed, offset, eps, sample_indices, twice
    )
