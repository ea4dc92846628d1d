from __future__ import annotations

from torch import Tensor

from cnm_kernels.checks import Arguments
from cnm_kernels.ops._call import autocast, run


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, relu: bool = False, lengths: Tensor | None = None
) -> Tensor:
    """A linear layer, x W^T + b; with ``relu`` negative results are 0.

    Unlike ``torch.nn.functional.linear`` it takes narrow x with float32 parameters, whose gradients then come back in
    float32: training keeps master weights without casting them. It can leave padding out, which then costs nothing,
    and multiply groups of columns (attention's heads) each with a weight of its own. Differentiable in x, weight and
    bias.

    float32 is multiplied as ``torch.set_float32_matmul_precision`` says where this is called, forward and backward:
    under "high" and "medium" on CPUs with AMX as sums of two bfloat16 numbers, off by 4e-6 of each product in the mean;
    what is not finite or beyond bfloat16's range is computed in float32. ``products`` says what other CPUs do.

    Args:
        x: [..., K], with a grouped weight [..., G, K]; with lengths [B, L, K] or [B, L, G, K].
        weight: [M, K] or [G, M, K], the dtype of x or float32, in any strides.
        bias: [M] or [G, M], likewise.
        lengths: [B] int64; x[b, lengths[b]:] is padding: its results are 0, and it takes part in no gradient.

    Returns:
        [..., M] or [..., G, M] in the dtype of x.
    """
    check = Arguments("linear")
    (x,) = autocast(x)
    grouped = isinstance(weight, Tensor) and weight.dim() == 3
    group = "G " if grouped else ""
    if lengths is None:
        check.floating("x", x, f"... {group}K")
    else:
        check.floating("x", x, f"B L {group}K")
        check.integer("lengths", lengths, "B")
    check.floating("weight", weight, f"{group}M K", own_dtype=True)
    if bias is not None:
        check.floating("bias", bias, f"{group}M", own_dtype=True)
        if bias.dtype.itemsize < weight.dtype.itemsize:
            bias = bias.to(weight.dtype)
    return run("linear", x, x, weight, bias, check.flag("relu", relu), lengths)
