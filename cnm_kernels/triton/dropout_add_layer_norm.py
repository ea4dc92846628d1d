"""dropout_add_layer_norm in Triton: a forward kernel, a backward kernel that draws the mask again, and a kernel that
adds the partial sums of the parameters' gradients. Number and order of these sums depend only on the sizes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cnm_kernels.reference import dropout_threshold
from cnm_kernels.triton.common import floats, narrow
from cnm_kernels.triton.dropout import kept_scale
from cnm_kernels.triton.philox import keep_elements, keep_groups

TILE = 2048  # elements in a tile
MAX_PARTS = 512  # number of partial sums of the parameters' gradients
_SMALLER, _LARGER = tl.constexpr(2.0**-96), tl.constexpr(2.0**96)  # sizes of rows, as in csrc/dropout_add_layer_norm.h
_LEAST, _MOST = tl.constexpr(2.0**-80), tl.constexpr(torch.finfo(torch.float32).max)  # variances of rows at their own


@triton.jit
def _keep(
    rows, N, D, threshold, seed_ptr, samples_ptr, sample_rows, offset,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, ALIGNED: tl.constexpr, INDEXED: tl.constexpr,
):  # fmt: skip
    """Returns the mask of the elements that dropout keeps. [ROWS, BLOCK_D]"""
    seed = tl.load(seed_ptr)
    drawn = rows.to(tl.int64)  # the rows of the larger batch, whose masks these rows use
    if INDEXED:
        sample = tl.load(samples_ptr + drawn // sample_rows, mask=rows < N, other=0)
        drawn = sample * sample_rows + drawn % sample_rows
    first = drawn[:, None] * D
    if ALIGNED:  # a row is a multiple of eight elements
        group = first // 8 + tl.arange(0, BLOCK_D // 8)[None, :]
        return tl.reshape(keep_groups(group, threshold, seed, offset), [ROWS, BLOCK_D])
    else:
        return keep_elements(first + tl.arange(0, BLOCK_D)[None, :], threshold, seed, offset)


@triton.jit
def _total(
    x_ptr, residual_ptr, seed_ptr, samples_ptr, rows, size, N, D, sample_rows, threshold, kept_scale, offset,
    DROPS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, ALIGNED: tl.constexpr, INDEXED: tl.constexpr,
):  # fmt: skip
    """Computes size (residual + dropout(x)) of a tile, and the mask of kept elements; a size of 1 changes nothing."""
    columns = tl.arange(0, BLOCK_D)
    place = rows.to(tl.int64)[:, None] * D + columns[None, :]
    inside = (rows < N)[:, None] & (columns < D)[None, :]
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)
    x = x * size[:, None]
    keep = inside
    if DROPS:
        keep = _keep(
            rows, N, D, threshold, seed_ptr, samples_ptr, sample_rows, offset, ROWS, BLOCK_D, ALIGNED, INDEXED
        )  # fmt: skip
        x = tl.where(keep, x * kept_scale, 0.0)
    return residual * size[:, None] + x, keep


@triton.jit
def _moments(total, within, D):
    """Mean, deviation from it, and mean square of that, of a tile's rows."""
    mean = tl.sum(total, 1) / D
    centered = tl.where(within, total - mean[:, None], 0.0)
    return mean, centered, tl.sum(centered * centered, 1) / D


@triton.jit(do_not_specialize=["threshold", "offset"])
def _forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, seed_ptr, samples_ptr, out_ptr, stats_ptr,
    N, D, sample_rows, threshold, kept_scale, offset, eps,
    DROPS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, ALIGNED: tl.constexpr, INDEXED: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    within = (columns < D)[None, :]
    size = tl.full([ROWS], 1.0, tl.float32)
    total, _ = _total(
        x_ptr, residual_ptr, seed_ptr, samples_ptr, rows, size, N, D, sample_rows, threshold, kept_scale,
        offset.to(tl.int64), DROPS, ROWS, BLOCK_D, ALIGNED, INDEXED,
    )  # fmt: skip
    mean, centered, squares = _moments(total, within, D)
    variance = squares + eps
    size = tl.where((variance < _LEAST) & (tl.abs(mean) < 1.0), _LARGER, size)
    size = tl.where(variance <= _MOST, size, _SMALLER)
    if tl.max((size != 1.0).to(tl.int32), 0) > 0:
        total, _ = _total(
            x_ptr, residual_ptr, seed_ptr, samples_ptr, rows, size, N, D, sample_rows, threshold, kept_scale,
            offset.to(tl.int64), DROPS, ROWS, BLOCK_D, ALIGNED, INDEXED,
        )  # fmt: skip
        mean, centered, squares = _moments(total, within, D)
        variance = squares + eps * size * size
    deviation = 1.0 / tl.where(squares == 0.0, tl.sqrt(eps) * size, tl.sqrt(variance))
    weight = tl.load(weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    out = centered * deviation[:, None] * weight[None, :] + bias[None, :]
    place = rows.to(tl.int64)[:, None] * D + columns[None, :]
    tl.store(out_ptr + place, narrow(out, out_ptr.dtype.element_ty), mask=(rows < N)[:, None] & within)
    mean = tl.where(size == _LARGER, mean * _SMALLER, mean)
    deviation = tl.where(size == _LARGER, deviation * _LARGER, tl.where(size == _SMALLER, -deviation, deviation))
    tl.store(stats_ptr + rows * 2, mean, mask=rows < N)
    tl.store(stats_ptr + rows * 2 + 1, deviation, mask=rows < N)


@triton.jit(do_not_specialize=["threshold", "offset"])
def _backward_kernel(
    d_out_ptr, x_ptr, residual_ptr, weight_ptr, stats_ptr, d_again_ptr, seed_ptr, samples_ptr, d_x_ptr, d_residual_ptr,
    parts_ptr, N, D, parts, sample_rows, threshold, kept_scale, offset,
    AGAIN: tl.constexpr, DROPS: tl.constexpr, NEED_X: tl.constexpr, NEED_RESIDUAL: tl.constexpr,
    NEED_WEIGHTS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, ALIGNED: tl.constexpr, INDEXED: tl.constexpr,
):  # fmt: skip
    """dx = dropout'(dt), dresidual = dt = r (g - mean g - n mean(g n)), g = dout w, n = normalised; parts of dw, db."""
    columns = tl.arange(0, BLOCK_D)
    weight = tl.load(weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    d_weight = tl.zeros([BLOCK_D], tl.float32)
    d_bias = tl.zeros([BLOCK_D], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(N, ROWS), parts):
        rows = tile * ROWS + tl.arange(0, ROWS)
        mean = tl.load(stats_ptr + rows * 2, mask=rows < N, other=0.0)
        deviation = tl.load(stats_ptr + rows * 2 + 1, mask=rows < N, other=0.0)
        size = tl.where(deviation < 0.0, _SMALLER, 1.0)
        deviation = tl.abs(deviation)
        total, keep = _total(
            x_ptr, residual_ptr, seed_ptr, samples_ptr, rows, size, N, D, sample_rows, threshold, kept_scale,
            offset.to(tl.int64), DROPS, ROWS, BLOCK_D, ALIGNED, INDEXED,
        )  # fmt: skip
        place = rows.to(tl.int64)[:, None] * D + columns[None, :]
        inside = (rows < N)[:, None] & (columns < D)[None, :]
        d_out = tl.load(d_out_ptr + place, mask=inside, other=0.0).to(tl.float32)
        if AGAIN:
            d_out += tl.load(d_again_ptr + place, mask=inside, other=0.0).to(tl.float32)
        normalized = tl.where(inside, (total - mean[:, None]) * deviation[:, None], 0.0)
        if NEED_WEIGHTS:
            d_weight += tl.sum(d_out * normalized, 0)
            d_bias += tl.sum(d_out, 0)
        if NEED_X or NEED_RESIDUAL:
            scaled = d_out * weight[None, :]
            along = tl.sum(scaled * normalized, 1) / D
            d_total = (scaled - (tl.sum(scaled, 1) / D)[:, None] - normalized * along[:, None]) * deviation[:, None]
            d_total = d_total * size[:, None]
            if NEED_RESIDUAL:
                tl.store(d_residual_ptr + place, narrow(d_total, d_residual_ptr.dtype.element_ty), mask=inside)
            if NEED_X:
                if DROPS:
                    d_total = tl.where(keep, d_total * kept_scale, 0.0)
                tl.store(d_x_ptr + place, narrow(d_total, d_x_ptr.dtype.element_ty), mask=inside)
    if NEED_WEIGHTS:
        part = parts_ptr + tl.program_id(0) * 2 * D + columns
        tl.store(part, d_weight, mask=columns < D)
        tl.store(part + D, d_bias, mask=columns < D)


@triton.jit
def _sum_parts_kernel(
    parts_ptr, d_weight_ptr, d_bias_ptr, D, parts, PARTS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        inside = (part < parts)[:, None] & (columns < 2 * D)[None, :]
        total += tl.sum(tl.load(parts_ptr + part[:, None] * 2 * D + columns[None, :], mask=inside, other=0.0), 0)
    tl.store(d_weight_ptr + columns, narrow(total, d_weight_ptr.dtype.element_ty), mask=columns < D)
    place = columns - D
    tl.store(d_bias_ptr + place, narrow(total, d_bias_ptr.dtype.element_ty), mask=(columns >= D) & (columns < 2 * D))


SCHEMAS = {
    "dropout_add_layer_norm": "(Tensor x, Tensor residual, Tensor weight, Tensor bias, float p, Tensor seed, "
    "int offset, float eps, Tensor? sample_indices) -> (Tensor, Tensor)",
    "dropout_add_layer_norm_backward": "(Tensor d_out, Tensor? d_again, Tensor x, Tensor residual, Tensor weight, "
    "Tensor stats, float p, Tensor seed, int offset, Tensor? sample_indices, bool need_x, bool need_residual, "
    "bool need_weights) -> (Tensor, Tensor, Tensor, Tensor)",
}


def _tiles(x: Tensor) -> tuple[int, int, int, int, dict[str, int]]:
    """Returns the number of rows N, their width D, the rows of a tile, and the tile's layout."""
    D = x.size(-1)
    BLOCK_D = max(triton.next_power_of_2(D), 8)
    rows = max(TILE // BLOCK_D, 1)
    return (
        x.numel() // max(D, 1),
        D,
        rows,
        BLOCK_D,
        {"num_warps": 4 if BLOCK_D <= 4096 else 16, "enable_fp_fusion": True},
    )


def _samples(sample_indices: Tensor | None, N: int) -> tuple[Tensor | None, int]:
    """Returns the indices in the kernels' form, and the number of rows of a sample."""
    if sample_indices is None or sample_indices.numel() == 0:
        return None, 1
    return sample_indices.contiguous(), N // sample_indices.numel()


def forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    p: float,
    seed: Tensor,
    offset: int,
    eps: float,
    sample_indices: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    N, D, rows, BLOCK_D, launch = _tiles(x)
    out, stats = x.new_empty(x.shape), floats(x, *x.shape[:-1], 2)
    if out.numel():
        tensors = (tensor.contiguous() for tensor in (x, residual, weight, bias))
        samples, sample_rows = _samples(sample_indices, N)
        _forward_kernel[(triton.cdiv(N, rows),)](
            *tensors, seed, samples, out, stats, N, D, sample_rows, dropout_threshold(p), kept_scale(p), offset, eps,
            p > 0, rows, BLOCK_D, D % 8 == 0, sample_indices is not None, **launch,
        )  # fmt: skip
    return out, stats


def backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    N, D, rows, BLOCK_D, launch = _tiles(x)
    d_x, d_residual = (x.new_empty(x.shape if need else 0) for need in (need_x, need_residual))
    d_weight = weight.new_empty(weight.shape if need_weights else 0)
    d_bias = floats(x, *d_weight.shape)
    if x.numel() == 0:
        return d_x, d_residual, d_weight.zero_(), d_bias.zero_()
    count = min(triton.cdiv(N, rows), MAX_PARTS)
    parts = floats(x, count, 2, D) if need_weights else None
    samples, sample_rows = _samples(sample_indices, N)
    tensors = (tensor.contiguous() for tensor in (d_out, x, residual, weight, stats))
    again = None if d_again is None else d_again.contiguous()
    _backward_kernel[(count,)](
        *tensors, again, seed, samples, d_x, d_residual, parts, N, D, count, sample_rows, dropout_threshold(p),
        kept_scale(p), offset, again is not None, p > 0, need_x, need_residual, need_weights, rows, BLOCK_D, D % 8 == 0,
        sample_indices is not None, **launch,
    )  # fmt: skip
    if need_weights:
        _sum_parts_kernel[(triton.cdiv(2 * D, 32),)](
            parts, d_weight, d_bias, D, count, 64, 32, num_warps=4, enable_fp_fusion=True
        )
    return d_x, d_residual, d_weight, d_bias


IMPLEMENTATIONS = {"dropout_add_layer_norm": forward, "dropout_add_layer_norm_backward": backward}
