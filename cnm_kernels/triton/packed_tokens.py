"""Tokens that count, counted through: padding and rows without a gradient cost nothing, and the host need not know.

``offsets`` [M + 1] int32 are running sums of the rows' lengths; packed token p belongs to the last row that begins at
or before p. Kernels are launched for all M L tokens and leave where no packed token is left.
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
    """[M + 1] int32; rows whose gradient is 0 count no token."""
    M = lengths.numel()
    out = torch.empty(M + 1, dtype=torch.int32, device=lengths.device)
    _offsets_kernel[(1,)](lengths, gradient, out, M, L, gradient is not None, 1024, num_warps=8, enable_fp_fusion=True)
    return out


@triton.jit
def find_tokens(offsets_ptr, packed, count, M, STEPS: tl.constexpr):
    """(row, place in it) of packed tokens [N] int32; of those past the end some token's."""
    wanted = tl.minimum(packed, count - 1)
    low = tl.zeros(packed.shape, tl.int32)  # rows that end at or before the token are below
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
    """Halvings until one of M rows is left."""
    return max(M, 1).bit_length()
