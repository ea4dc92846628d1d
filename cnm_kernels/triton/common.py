"""Functions that all Triton kernels use: products, rounding, sizes, and workarounds for the interpreter."""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from cnm_kernels import gpu

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_INTERPRETED = tl.constexpr(INTERPRETED)
MIN_DOT = 16  # the smallest side that tl.dot accepts


@triton.jit
def dot(a, b):
    """Returns a @ b in float32: on tensor cores for 16-bit operands, as three tf32 products for float32 operands."""
    if _INTERPRETED:  # the interpreter's bfloat16 products are wrong
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def at_most(values, limit):
    """Holds a probability that is recomputed to its limit, however the products of this kernel round; NaN stays."""
    return tl.where(values > limit, limit, values)


@triton.jit
def narrow(values, dtype: tl.constexpr):
    """Rounds float32 to the nearest value of a dtype."""
    if _INTERPRETED and dtype == tl.bfloat16:  # the interpreter would truncate
        bits = values.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        values = bits.to(tl.float32, bitcast=True)
    return values.to(dtype)


def block(size: int, most: int = 1 << 30) -> int:
    """Returns the smallest power of two that is at least ``size`` and a valid side of tl.dot."""
    return min(max(triton.next_power_of_2(size), MIN_DOT), most)


def rows_contiguous(tensor: Tensor) -> Tensor:
    """Returns the tensor, or a copy if its last dimension is not contiguous, or if a sample's elements lie so far apart
    (in time-major views) that 32 bits do not hold the way from the first to the last."""
    within = sum((size - 1) * stride for size, stride in zip(tensor.shape[1:], tensor.stride()[1:], strict=True))
    good = tensor.numel() == 0 or (tensor.stride(-1) == 1 and within < 2**31)
    return tensor if good else tensor.contiguous()


def floats(like: Tensor, *shape: int) -> Tensor:
    """Allocates an uninitialised float32 tensor on the device of ``like``."""
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def shared_memory(tensor: Tensor) -> int:
    """Returns how many bytes of shared memory a program may ask for on the tensor's GPU."""
    return gpu.shared_memory(tensor.device.index) if tensor.is_cuda else 1 << 30
