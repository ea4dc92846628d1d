"""dropout in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from cnm_kernels.constants import DROPOUT_LEVELS
from cnm_kernels.reference import dropout_threshold
from cnm_kernels.triton.common import narrow
from cnm_kernels.triton.philox import keep_groups

BLOCK = 2048


@triton.jit(do_not_specialize=["threshold", "offset"])
def _kernel(x_ptr, seed_ptr, out_ptr, numel, threshold, kept_scale, offset, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    index = first + tl.arange(0, BLOCK)
    group = first // 8 + tl.arange(0, BLOCK // 8)
    keep = tl.reshape(keep_groups(group, threshold, tl.load(seed_ptr), offset.to(tl.int64)), [BLOCK])
    x = tl.load(x_ptr + index, mask=index < numel, other=0.0).to(tl.float32)
    out = tl.where(keep, x * kept_scale, 0.0)
    tl.store(out_ptr + index, narrow(out, out_ptr.dtype.element_ty), mask=index < numel)


SCHEMAS = {"dropout": "(Tensor x, float p, Tensor seed, int offset) -> Tensor"}


def kept_scale(p: float) -> float:
    """Returns the factor that scales kept elements."""
    return DROPOUT_LEVELS / max(DROPOUT_LEVELS - dropout_threshold(p), 1)


def dropout(x: Tensor, p: float, seed: Tensor, offset: int) -> Tensor:
    x = x.contiguous()
    out = x.new_empty(x.shape)
    if out.numel():
        grid = (triton.cdiv(x.numel(), BLOCK),)
        _kernel[grid](
            x,
            seed,
            out,
            x.numel(),
            dropout_threshold(p),
            kept_scale(p),
            offset,
            BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return out


IMPLEMENTATIONS = {"dropout": dropout}
