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
def _nearest(center, length, last):
    """Finds the index nearest to the center, of two the first: where the largest sample is."""
    inside = tl.where(center > 0.0, tl.minimum(center, 1.0), 0.0)  # 0 also for a NaN
    below = tl.floor(tl.minimum(inside * last, last - 1.0))
    above = tl.abs(tl.fma(-inside, last, below + 1.0)) < tl.abs(tl.fma(-inside, last, below))
    return tl.where((length > 1) & above, below + 1.0, below)


@triton.jit
def _factors(index, center, width, length, NORMALIZED: tl.constexpr):
    """Computes t and s of g = exp(-alpha t s): both (x - c) / w = u. Over the largest sample, which is at the position
    p, u - u_p and u + u_p, the difference of their squares as a product, in which nothing cancels; positions are
    counted, x = j / (length - 1), and j - c (length - 1) is rounded once."""
    if NORMALIZED:
        j = index.to(tl.float32)
        last = tl.maximum(length - 1, 1).to(tl.float32)
        peak = _nearest(center, length, last)
        t = (j - peak) / (last * width)
        s = (tl.fma(-center, last, j) + tl.fma(-center, last, peak)) / (last * width)
        most = 3.402823466e38  # finite: at the peak it is multiplied by 0; a NaN stays
        s = tl.where(s > most, most, tl.where(s < -most, -most, s))
        s = tl.where(t * s < 0.0, 0.0, s)  # no sample is larger than the peak's; what lies beyond the last would be
    else:
        t = (positions(index, length) - center) / width
        s = t
    return t, s


@triton.jit
def _gradient(t, s, d_mask, width, alpha, min_width, COMPLEMENT: tl.constexpr):
    """Sums d_mask dm/dc and d_mask dm/dw of g = exp(-alpha t s): g 2 alpha t / w and g 2 alpha t s / w.

    No gradient passes to a width below the clamp.
    """
    slope = 2.0 * alpha
    if COMPLEMENT:
        slope = -slope
    g = tl.exp(-(alpha * t) * s)
    common = d_mask * g * t * slope / clamp(width, min_width)
    d_center = tl.sum(tl.where(g == 0.0, 0.0, common), 0)  # t and s may be infinite there
    d_width = tl.sum(tl.where(g == 0.0, 0.0, common * s), 0)
    return d_center, tl.where(width < min_width, 0.0, d_width)


@triton.jit
def moment_gradient(x, d_mask, center, width, alpha, min_width, COMPLEMENT: tl.constexpr):
    """Sums over x of d_mask dm/dc and d_mask dm/dw: dg/dc = g 2 alpha (x - c) / w^2, dg/dw = g 2 alpha (x - c)^2 / w^3.

    No gradient passes to a width below the clamp.
    """
    u = (x - center) / clamp(width, min_width)
    return _gradient(u, u, d_mask, width, alpha, min_width, COMPLEMENT)


@triton.jit
def _forward_kernel(
    center_ptr, width_ptr, out_ptr, length, alpha, min_width,
    COMPLEMENT: tl.constexpr, NORMALIZED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    center = tl.load(center_ptr + row).to(tl.float32)
    width = clamp(tl.load(width_ptr + row).to(tl.float32), min_width)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    t, s = _factors(index, center, width, length, NORMALIZED)
    mask = tl.exp(-(alpha * t) * s)
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
    NORMALIZED: tl.constexpr,
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
        t, s = _factors(index, center, clamp(width, min_width), length, NORMALIZED)
        to_center, to_width = _gradient(t, s, d_out, width, alpha, min_width, COMPLEMENT)
        d_center += to_center
        d_width += to_width
    tl.store(d_center_ptr + row, narrow(d_center, d_center_ptr.dtype.element_ty))
    tl.store(d_width_ptr + row, narrow(d_width, d_width_ptr.dtype.element_ty))


SCHEMAS = {
    "gaussian_mask": "(Tensor center, Tensor width, int length, float alpha, float min_width, bool complement, "
    "bool normalized) -> Tensor",
    "gaussian_mask_backward": "(Tensor d_out, Tensor center, Tensor width, float alpha, float min_width, "
    "bool complement, bool normalized) -> (Tensor, Tensor)",
}


def forward(
    center: Tensor, width: Tensor, length: int, alpha: float, min_width: float, complement: bool, normalized: bool
) -> Tensor:
    out = center.new_empty((*center.shape, length))
    if out.numel():
        grid = (center.numel(), triton.cdiv(length, BLOCK))
        center, width = center.contiguous(), width.contiguous()
        _forward_kernel[grid](
            center, width, out, length, alpha, min_width, complement, normalized, BLOCK,
            num_warps=2, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def backward(
    d_out: Tensor, center: Tensor, width: Tensor, alpha: float, min_width: float, complement: bool, normalized: bool
) -> tuple[Tensor, Tensor]:
    d_center, d_width = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (center, width))
    if center.numel():
        arguments = (d_out.contiguous(), center.contiguous(), width.contiguous(), d_center, d_width)
        _backward_kernel[(center.numel(),)](
            *arguments, d_out.size(-1), alpha, min_width, complement, normalized, BLOCK,
            num_warps=2, enable_fp_fusion=True,
        )  # fmt: skip
    return d_center, d_width


IMPLEMENTATIONS = {"gaussian_mask": forward, "gaussian_mask_backward": backward}
