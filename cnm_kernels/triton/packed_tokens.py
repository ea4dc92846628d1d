"""Packs the active tokens: padding and rows without a gradient cost nothing, without synchronising with the host.

Kernels are launched for all M L tokens; programs past the last packed token return at once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cnm_kernels.triton.common import floats


class PackedTokens(NamedTuple):
    """The active tokens of rows [M, L], row by row; behind the last one the lists [N = M L] hold nothing.

    Attributes:
        offsets: [M + 1] int32, running sums of how many each row has.
        tokens: [N] int32, their indices.
        targets: [N] int32, their words. For the backward, like the next.
        notes: [3, N] float32, of each max z, log sum exp(z - max) and the gradient of its nll.
    """

    offsets: Tensor
    tokens: Tensor
    targets: Tensor
    notes: Tensor


@triton.jit
def _active(lengths_ptr, gradient_ptr, rows, inside, L, HAS_GRADIENT: tl.constexpr):
    """How many tokens of these rows are active."""
    lengths = tl.load(lengths_ptr + rows, mask=inside, other=0)
    lengths = tl.minimum(tl.maximum(lengths, 0), L).to(tl.int32)
    if HAS_GRADIENT:
        lengths = tl.where(tl.load(gradient_ptr + rows, mask=inside, other=0.0) == 0.0, 0, lengths)
    return lengths


@triton.jit
def _list_kernel(
    lengths_ptr, gradient_ptr, target_ptr, stats_ptr, offsets_ptr, tokens_ptr, targets_ptr, notes_ptr, M, L,
    HAS_GRADIENT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Of one row."""
    row = tl.program_id(0)
    before = 0
    for start in range(0, row, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        before += tl.sum(_active(lengths_ptr, gradient_ptr, rows, rows < row, L, HAS_GRADIENT), 0)
    length = _active(lengths_ptr, gradient_ptr, row, row < M, L, HAS_GRADIENT)
    if row == 0:
        tl.store(offsets_ptr, 0)
    tl.store(offsets_ptr + 1 + row, before + length)
    for start in range(0, length, BLOCK_L):
        place = start + tl.arange(0, BLOCK_L)
        inside = place < length
        token, to = row * L + place, before + place
        tl.store(tokens_ptr + to, token, mask=inside)
        if HAS_GRADIENT:
            N = M * L
            tl.store(targets_ptr + to, tl.load(target_ptr + token, mask=inside, other=0).to(tl.int32), mask=inside)
            tl.store(notes_ptr + to, tl.load(stats_ptr + token, mask=inside, other=0.0), mask=inside)
            tl.store(notes_ptr + N + to, tl.load(stats_ptr + N + token, mask=inside, other=0.0), mask=inside)
            d_nll = tl.load(gradient_ptr + row) / length.to(tl.float32)
            tl.store(notes_ptr + 2 * N + to, tl.zeros([BLOCK_L], tl.float32) + d_nll, mask=inside)


def pack(
    lengths: Tensor, L: int, gradient: Tensor | None = None, target: Tensor | None = None, stats: Tensor | None = None
) -> PackedTokens:
    """Lists the first ``lengths[m]`` tokens of each row; with ``gradient`` [M] not of rows where that is 0.

    Args:
        gradient, target, stats: of the rows' nll, the words [M, L], and what the forward keeps [2, M, L]; for a
            backward.
    """
    M = lengths.numel()
    N = M * L

    def whole(size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int32, device=lengths.device)

    graded = gradient is not None
    packed = PackedTokens(whole(M + 1), whole(N), whole(N if graded else 0), floats(lengths, 3 if graded else 0, N))
    _list_kernel[(M,)](
        lengths, gradient, target, stats, *packed, M, L, graded, 1024, min(triton.next_power_of_2(L), 128),
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return packed
