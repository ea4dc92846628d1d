"""intra_video_contrastive_loss in Triton: a single program computes the forward and sums in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from cnm_kernels.triton.common import floats, narrow

BLOCK = 512


@triton.jit
def _load(ptr, index, B):
    return tl.load(ptr + index, mask=index < B, other=0.0).to(tl.float32)


@triton.jit
def _hinge(margin, index, B):
    """Computes relu and keeps NaN; gives 0 past the end."""
    return tl.where((margin < 0.0) | (index >= B), 0.0, margin)


@triton.jit
def _slope(margin):
    """Computes the gradient of relu, one half at the kink, and 1 at NaN as torch.maximum has it."""
    return tl.where(margin < 0.0, 0.0, tl.where(margin == 0.0, 0.5, 1.0))


@triton.jit
def _forward_kernel(positive_ptr, hard_ptr, easy_ptr, loss_ptr, B, beta_1, beta_2, BLOCK: tl.constexpr):
    to_hard = 0.0
    to_easy = 0.0
    for start in range(0, B, BLOCK):
        index = start + tl.arange(0, BLOCK)
        positive = _load(positive_ptr, index, B)
        to_hard += tl.sum(_hinge(positive - _load(hard_ptr, index, B) + beta_1, index, B), 0)
        to_easy += tl.sum(_hinge(positive - _load(easy_ptr, index, B) + beta_2, index, B), 0)
    tl.store(loss_ptr, to_hard / B + to_easy / B)


@triton.jit
def _backward_kernel(
    d_loss_ptr, positive_ptr, hard_ptr, easy_ptr, d_positive_ptr, d_hard_ptr, d_easy_ptr, B, beta_1, beta_2,
    BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    share = tl.load(d_loss_ptr).to(tl.float32) / B
    positive = _load(positive_ptr, index, B)
    to_hard = share * _slope(positive - _load(hard_ptr, index, B) + beta_1)
    to_easy = share * _slope(positive - _load(easy_ptr, index, B) + beta_2)
    tl.store(d_positive_ptr + index, narrow(to_hard + to_easy, d_positive_ptr.dtype.element_ty), mask=index < B)
    tl.store(d_hard_ptr + index, narrow(-to_hard, d_hard_ptr.dtype.element_ty), mask=index < B)
    tl.store(d_easy_ptr + index, narrow(-to_easy, d_easy_ptr.dtype.element_ty), mask=index < B)


SCHEMAS = {
    "intra_video_contrastive_loss": "(Tensor positive, Tensor hard, Tensor easy, float beta_1, float beta_2) -> Tensor",
    "intra_video_contrastive_loss_backward": "(Tensor d_loss, Tensor positive, Tensor hard, Tensor easy, "
    "float beta_1, float beta_2) -> (Tensor, Tensor, Tensor)",
}


def forward(positive: Tensor, hard: Tensor, easy: Tensor, beta_1: float, beta_2: float) -> Tensor:
    loss = floats(positive)
    B = positive.numel()
    if B == 0:
        return loss.fill_(float("nan"))  # the mean of no elements
    nlls = (tensor.contiguous() for tensor in (positive, hard, easy))
    _forward_kernel[(1,)](*nlls, loss, B, beta_1, beta_2, BLOCK, num_warps=4, enable_fp_fusion=True)
    return loss


def backward(
    d_loss: Tensor, positive: Tensor, hard: Tensor, easy: Tensor, beta_1: float, beta_2: float
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = tuple(tensor.new_empty(tensor.shape) for tensor in (positive, hard, easy))
    B = positive.numel()
    if B:
        nlls = (tensor.contiguous() for tensor in (positive, hard, easy))
        grid = (triton.cdiv(B, BLOCK),)
        _backward_kernel[grid](d_loss, *nlls, *gradients, B, beta_1, beta_2, BLOCK, num_warps=4, enable_fp_fusion=True)
    return gradients  # type: ignore[return-value]


IMPLEMENTATIONS = {"intra_video_contrastive_loss": forward, "intra_video_contrastive_loss_backward": backward}
