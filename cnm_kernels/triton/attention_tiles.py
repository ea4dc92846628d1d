"""Loads, masks and stores tiles of queries and keys for all attention kernels."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from cnm_kernels.autograd.attention import unpack
from cnm_kernels.triton.common import narrow


@triton.jit
def load_rows(ptr, rows, L, stride_l, d, BLOCK_D: tl.constexpr):
    """Loads rows [N, BLOCK_D] of a head, with zeros beyond the last row and column."""
    columns = tl.arange(0, BLOCK_D)
    inside = (rows[:, None] < L) & (columns[None, :] < d)
    return tl.load(ptr + rows[:, None] * stride_l + columns[None, :], mask=inside, other=0.0)


@triton.jit
def store_rows(ptr, values, rows, L, stride_l, d, BLOCK_D: tl.constexpr):
    columns = tl.arange(0, BLOCK_D)
    inside = (rows[:, None] < L) & (columns[None, :] < d)
    tl.store(ptr + rows[:, None] * stride_l + columns[None, :], narrow(values, ptr.dtype.element_ty), mask=inside)


@triton.jit
def real_keys(lengths_ptr, b, Lk, HAS_LENGTHS: tl.constexpr):
    """Returns the number of a sample's keys that are not padding."""
    if HAS_LENGTHS:
        return tl.minimum(tl.maximum(tl.load(lengths_ptr + b), 0), Lk).to(tl.int32)
    else:
        return Lk


@triton.jit
def visible(rows, keys, limit, CAUSAL: tl.constexpr):
    """Returns a mask [M, N] of the keys that each query sees."""
    if CAUSAL:
        return (keys[None, :] < limit) & (keys[None, :] <= rows[:, None])
    else:
        return (keys[None, :] < limit) & (rows[:, None] >= 0)


def strides(*heads: Tensor) -> list[int]:
    """Returns the strides of batch, head and position of each tensor."""
    return [stride for tensor in heads for stride in tensor.stride()[:3]]


def gradient_views(
    gradients: list[Tensor], key: Tensor | None, value: Tensor | None, needs: tuple[bool, ...]
) -> list[Tensor | None]:
    """Returns the gradients as views [B, H, L, d] for query, key and value; None for one that is not needed."""
    of_query, of_key, of_value = (gradient if need else None for gradient, need in zip(gradients, needs, strict=True))
    if key is None:
        return [None] * 3 if of_query is None else list(unpack(of_query, None, None))
    if value is None:
        return [of_query, *([None] * 2 if of_key is None else of_key.permute(2, 0, 3, 1, 4).unbind(0))]
    return [of_query, of_key, of_value]
