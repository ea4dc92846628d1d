"""gaussian_mask in Triton, and the Gaussian that attention computes in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cnm_kernels.triton.common import narrow

BLOCK = 256  # points of a Gaussian that are computed at a time


@triton.jit
def positions(index, length):
    """Computes linspace(0, 1, length) from the nearer end, as torch.linspace does."""
    last = tl.maximum(length - 1, 1).to(tl.float32)
    step = 1.0 / last
    j = index.to(tl.float32)
    from_the_end = 1.0 - step * (last - j)
    return tl.where((index < length // 2) | (length <= 1), step * j, from_the_end)


@triton.jit
def clamp(width, min_width):
    return tl.where(width < min_width, min_width, width)  # keeps NaN


@triton.jit
def gaussian(x, center, width, alpha):
    """Computes g = exp(-alpha (x - c)^2 / w^2); the caller clamps ``width``."""
    u = (x - center) / width  # divided first: the width's square may be 0 or infinite
    return tl.exp(-(alpha * u) * u)


@triton.jit
def moment_gradient(x, d_mask, center, width, alpha, min_width, COMPLEMENT: tl.constexpr):
    """Sums over x of d_mask dm/dc and d_mask dm/dw: dg/dc = g 2 alpha (x - c) / w^2, dg/dw = g 2 alpha (x - c)^2 / w^3.

    No gradient passes to a width below the clamp.
    """
    clamped = clamp(width, min_width)
    slope = 2.0 * alpha
    if COMPLEMENT:
        slope = -slope
    u = (x - center) / clamped
    g = gaussian(x, center, clamped, alpha)
    common = tl.where(g == 0.0, 0.0, d_mask * g * u * slope / clamped)
    d_width = tl.sum(common * u, 0)
    return tl.sum(common, 0), tl.where(width < min_width, 0.0, d_width)


@triton.jit
def _forward_kernel(
    center_ptr, width_ptr, out_ptr, length, alpha, min_width, COMPLEMENT: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    center = tl.load(center_ptr + row).to(tl.float32)
    width = clamp(tl.load(width_ptr + row).to(tl.float32), min_width)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = gaussian(positions(index, length), center, width, alpha)
    if COMPLEMENT:
        mask = 1.0 - mask
    tl.store(out_ptr + row * length + index, narrow(mask, out_ptr.dtype.element_ty), mask=index < length)


@triton.jit
def _backward_kernel(
    d_out_ptr,
    center_ptr,
    width_ptr,
    d_center_ptr,
    d_width_ptr,
    length,
    alpha,
    min_width,
    COMPLEMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    center = tl.load(center_ptr + row).to(tl.float32)
    width = tl.load(width_ptr + row).to(tl.float32)
    d_center = 0.0
    d_width = 0.0
    for start in range(0, length, BLOCK):
        index = start + tl.arange(0, BLOCK)
        d_out = tl.load(d_out_ptr + row * length + index, mask=index < length, other=0.0).to(tl.float32)
        x = positions(index, length)
        to_center, to_width = moment_gradient(x, d_out, center, width, alpha, min_width, COMPLEMENT)
        d_center += to_center
        d_width += to_width
    tl.store(d_center_ptr + row, narrow(d_center, d_center_ptr.dtype.element_ty))
    tl.store(d_width_ptr + row, narrow(d_width, d_width_ptr.dtype.element_ty))


SCHEMAS = {
    "gaussian_mask": "(Tensor center, Tensor width, int length, float alpha, float min_width, bool complement) "
    "-> Tensor",
    "gaussian_mask_backward": "(Tensor d_out, Tensor center, Tensor width, float alpha, float min_width, "
    "bool complement) -> (Tensor, Tensor)",
}


def forward(center: Tensor, width: Tensor, length: int, alpha: float, min_width: float, complement: bool) -> Tensor:
    out = center.new_empty((*center.shape, length))
    if out.numel():
        grid = (center.numel(), triton.cdiv(length, BLOCK))
        center, width = center.contiguous(), width.contiguous()
        _forward_kernel[grid](
            center, width, out, length, alpha, min_width, complement, BLOCK, num_warps=2, enable_fp_fusion=True
        )
    return out


def backward(
    d_out: Tensor, center: Tensor, width: Tensor, alpha: float, min_width: float, complement: bool
) -> tuple[Tensor, Tensor]:
    d_center, d_width = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (center, width))
    if center.numel():
        arguments = (d_out.contiguous(), center.contiguous(), width.contiguous(), d_center, d_width)
        _backward_kernel[(center.numel(),)](
            *arguments, d_out.size(-1), alpha, min_width, complement, BLOCK, num_warps=2, enable_fp_fusion=True
        )
    return d_center, d_width


IMPLEMENTATIONS = {"gaussian_mask": forward, "gaussian_mask_backward": backward}
