"""Label-smoothed negative log likelihood of logits that exist already, without further tensors of their size.

Per token (1-e)(lse - z_y) + e (lse - mean_v z_v); its gradient softmax(z) - (1-e) 1_y - e/V is computed from the logits
and two numbers a row in the backward, straight into the one tensor it needs. PyTorch's composition keeps the log
softmax as well. Rows are worked through in blocks that stay in a cache. Where the layer that makes the logits is at
hand, ``linear_nll`` does without them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = {"cpu": 1 << 17}  # numbers worked on at once: float32 in half a megabyte
BLOCK_ELSEWHERE = 1 << 24


def logits_nll(logits: Tensor, target: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """(nll, whether the likeliest word is the target) per token. Differentiable in logits.

    Args:
        logits: [..., V].
        target: [...] int64 in [0, V).
        label_smoothing: e, in [0, 1].

    Returns:
        [...] in float32 (float64 for float64), and [...] bool.
    """
    nll, correct = _LogitsNLL.apply(logits.flatten(0, -2), target.flatten(), label_smoothing)
    return nll.view(target.shape), correct.view(target.shape)


class _LogitsNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
        N = logits.size(0)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        nll = torch.empty(N, dtype=dtype, device=logits.device)
        # A large maximum would swallow the logarithm in max z + log sum exp(z - max).
        stats = torch.empty(2, N, dtype=dtype, device=logits.device)
        correct = torch.empty(N, dtype=torch.bool, device=logits.device)
        for rows in _blocks(logits):
            z, y = logits[rows].to(dtype), target[rows]
            highest, likeliest = z.max(-1)
            picked = z.gather(-1, y.unsqueeze(-1)).squeeze(-1)
            less = z - highest.unsqueeze(-1)
            below = less.mean(-1)
            log_total = less.exp_().sum(-1).log_()
            stats[0, rows], stats[1, rows] = highest, log_total
            nll[rows] = log_total + (1 - smoothing) * (highest - picked) - smoothing * below
            correct[rows] = likeliest == y
        ctx.save_for_backward(logits, target, stats)
        ctx.smoothing = smoothing
        ctx.mark_non_differentiable(correct)
        return nll, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_nll: Tensor, _: None) -> tuple[Tensor, None, None]:
        logits, target, stats = ctx.saved_tensors
        V, smoothing = logits.size(-1), ctx.smoothing
        d_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        for rows in _blocks(logits):
            d = d_nll[rows].unsqueeze(-1)
            highest, log_total = stats[:, rows].unsqueeze(-1)
            gradient = (logits[rows] - highest).sub_(log_total).exp_().sub_(smoothing / V).mul_(d)
            gradient.scatter_add_(-1, target[rows].unsqueeze(-1), (smoothing - 1) * d)
            d_logits[rows] = gradient
        return d_logits, None, None


def _blocks(logits: Tensor) -> Iterator[slice]:
    N, V = logits.shape
    size = max(BLOCK.get(logits.device.type, BLOCK_ELSEWHERE) // max(V, 1), 1)
    for start in range(0, N, size):
        yield slice(start, start + size)
