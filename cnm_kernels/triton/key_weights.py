"""The weights m + eps of a sample's keys in attention kernels: none, a tensor, a Gaussian, or one minus it."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from cnm_kernels.constants import KEY_WEIGHT_EPS
from cnm_kernels.triton.common import narrow
from cnm_kernels.triton.gaussian_mask import clamp, gaussian, moment_gradient, positions

NONE, TENSOR, GAUSSIAN, COMPLEMENT = 0, 1, 2, 3
_NONE, _TENSOR, _COMPLEMENT = tl.constexpr(NONE), tl.constexpr(TENSOR), tl.constexpr(COMPLEMENT)
_EPS = tl.constexpr(KEY_WEIGHT_EPS)


@dataclass(frozen=True)
class KeyWeights:
    """The kind of weights of a call, and the tensors that determine them."""

    kind: int
    first: Tensor | None  # [B, Lk] weights, or centers [B]
    second: Tensor | None  # widths [B]
    alpha: float
    min_width: float

    @staticmethod
    def of(
        key_weight: Tensor | None,
        center: Tensor | None,
        width: Tensor | None,
        alpha: float,
        min_width: float,
        complement: bool,
    ) -> KeyWeights:
        if center is not None and width is not None:
            kind = COMPLEMENT if complement else GAUSSIAN
            return KeyWeights(kind, center.contiguous(), width.contiguous(), alpha, min_width)
        if key_weight is not None:
            return KeyWeights(TENSOR, key_weight.contiguous(), None, alpha, min_width)
        return KeyWeights(NONE, None, None, alpha, min_width)


@triton.jit
def load_key_weights(first_ptr, second_ptr, b, keys, limit, Lk, alpha, min_width, KIND: tl.constexpr):
    """Computes m + eps of keys [N] float32; keys past the first ``limit`` of Lk get any finite value."""
    if KIND == _NONE:
        return tl.full(keys.shape, 1.0, tl.float32)
    elif KIND == _TENSOR:
        return tl.load(first_ptr + b * Lk + keys, mask=keys < limit, other=0.0).to(tl.float32) + _EPS
    else:
        center = tl.load(first_ptr + b).to(tl.float32)
        width = clamp(tl.load(second_ptr + b).to(tl.float32), min_width)
        m = gaussian(positions(keys, Lk), center, width, alpha)
        if KIND == _COMPLEMENT:
            m = 1.0 - m
        return m + _EPS


@triton.jit
def store_key_weight_gradient(
    d_first_ptr, d_second_ptr, first_ptr, second_ptr, b, keys, d_m, Lk, alpha, min_width, KIND: tl.constexpr
):
    """Stores the gradient d_m [N] of all keys of a sample, or derives those of center and width from it."""
    if KIND == _TENSOR:
        tl.store(d_first_ptr + b * Lk + keys, narrow(d_m, d_first_ptr.dtype.element_ty), mask=keys < Lk)
    else:
        center = tl.load(first_ptr + b).to(tl.float32)
        width = tl.load(second_ptr + b).to(tl.float32)
        d_m = tl.where(keys < Lk, d_m, 0.0)
        d_center, d_width = moment_gradient(
            positions(keys, Lk), d_m, center, width, alpha, min_width, KIND == _COMPLEMENT
        )
        tl.store(d_first_ptr + b, narrow(d_center, d_first_ptr.dtype.element_ty))
        tl.store(d_second_ptr + b, narrow(d_width, d_second_ptr.dtype.element_ty))
