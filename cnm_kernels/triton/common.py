"""What every Triton kernel uses: products, numbers of keys, the interpreter's limits."""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_INTERPRETED = tl.constexpr(INTERPRETED)
MIN_DOT = 16  # the smallest side tl.dot takes
MAX_PROGRAMS_Y = 65535


@triton.jit
def dot(a, b):
    """a @ b in float32: tensor cores on narrow operands, three tf32 products on float32."""
    if _INTERPRETED:  # whose bfloat16 products are wrong
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def narrow(values, dtype: tl.constexpr):
    """float32 rounded to the nearest of a dtype."""
    if _INTERPRETED and dtype == tl.bfloat16:  # the interpreter would cut off what does not fit
        bits = values.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        values = bits.to(tl.float32, bitcast=True)
    return values.to(dtype)


def block(size: int, most: int = 1 << 30) -> int:
    """The power of two that covers ``size``, for a side of tl.dot."""
    return min(max(triton.next_power_of_2(size), MIN_DOT), most)


def rows_contiguous(tensor: Tensor) -> Tensor:
    """The tensor, or a copy whose last dimension is contiguous."""
    return tensor if tensor.stride(-1) == 1 or tensor.numel() == 0 else tensor.contiguous()


def floats(like: Tensor, *shape: int) -> Tensor:
    """An uninitialised float32 tensor on the device of ``like``."""
    return torch.empty(shape, dtype=torch.float32, device=like.device)
