from __future__ import annotations

from torch import Tensor

from cnm_kernels.checks import Arguments
from cnm_kernels.ops._call import run
from cnm_kernels.ops._checks import seed_tensor


def dropout(x: Tensor, p: float, *, seed: int | Tensor, offset: int = 0) -> Tensor:
    """Dropout whose mask depends on (seed, offset, element index) alone: the same on every backend and device.

    Each element is dropped with probability p (to the nearest 1/65,536), the rest scaled to keep the expectation.
    The mask is drawn from Philox4x32-10; ``reference.keep_mask`` states which bits decide which element.

    Args:
        x: any shape; elements count in row-major order whatever the strides.
        p: in [0, 1]; 0 returns x.
        seed: an int, or an int64 tensor of one element on x's device (which a CUDA graph can replay with new values).
        offset: which draw of this seed; use another for every dropout of a step.

    Returns:
        The shape and dtype of x.
    """
    check = Arguments("dropout")
    check.floating("x", x, "...")
    check.number("p", p, 0, 1)
    offset = check.whole("offset", offset, -(1 << 63), (1 << 63) - 1)
    return run("dropout", x, x, p, seed_tensor(check, seed, x), offset)
