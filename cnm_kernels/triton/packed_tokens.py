"""Packs the active tokens: padding and rows without a gradient cost nothing, without synchronising with the host.

``offsets`` [M + 1] int32 are running sums of the rows' lengths; packed token p belongs to the last row that begins at
or before p. Kernels are launched for all M L tokens; programs past the last packed token return at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _offsets_kernel(
    lengths_ptr, gradient_ptr, offsets_ptr, M, L, HAS_GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    before = 0
    for start in range(0, M, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        lengths = tl.load(lengths_ptr + rows, mask=rows < M, other=0)
        lengths = tl.minimum(tl.maximum(lengths, 0), L).to(tl.int32)
        if HAS_GRADIENT:
            gradient = tl.load(gradient_ptr + rows, mask=rows < M, other=0.0)
            lengths = tl.where(gradient == 0.0, 0, lengths)
        tl.store(offsets_ptr + 1 + rows, before + tl.cumsum(lengths, 0), mask=rows < M)
        before += tl.sum(lengths, 0)
    tl.store(offsets_ptr, 0)


def offsets(lengths: Tensor, L: int, gradient: Tensor | None = None) -> Tensor:
    """Returns the offsets [M + 1] int32; rows whose gradient is 0 have no tokens."""
    M = lengths.numel()
    out = torch.empty(M + 1, dtype=torch.int32, device=lengths.device)
    _offsets_kernel[(1,)](lengths, gradient, out, M, L, gradient is not None, 1024, num_warps=8, enable_fp_fusion=True)
    return out


@triton.jit
def find_tokens(offsets_ptr, packed, count, M, STEPS: tl.constexpr):
    """Returns (row, position in it) of packed tokens [N] int32; past the end those of an arbitrary token."""
    wanted = tl.minimum(packed, count - 1)
    low = tl.zeros(packed.shape, tl.int32)  # all rows below it end at or before the token
    high = tl.full(packed.shape, 0, tl.int32) + M
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        searching = low < high
        ends = tl.load(offsets_ptr + 1 + middle, mask=searching, other=0)
        later = searching & (ends <= wanted)
        low = tl.where(later, middle + 1, low)
        high = tl.where(searching & (ends > wanted), middle, high)
    return low, wanted - tl.load(offsets_ptr + low)


def steps(M: int) -> int:
    """Returns the number of halvings that reduce M rows to one."""
    return max(M, 1).bit_length()
