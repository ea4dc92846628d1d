"""A mixture of Gaussians per proposal as the weight of an attention's keys: two moments that no single Gaussian covers.

    python -m examples.mixture_of_gaussians

``weighted_attention`` takes any weight per key as a tensor and gives its gradient back, so a mixture is one line on top
of ``gaussian_mask``. Here 2 proposals of 3 Gaussians each learn, from what the attention returns alone, to look where a
planted signal is.
"""

from __future__ import annotations

import torch
from torch import Tensor

import cnm_kernels

SENTENCES, PROPOSALS, GAUSSIANS = 4, 2, 3
HEADS, QUERIES, FRAMES, HEAD_DIM = 2, 5, 60, 16


def mixture(center: Tensor, width: Tensor, logits: Tensor, length: int) -> Tensor:
    """[B, K, G] each -> [B, K, length]: the Gaussians of a proposal, weighted by softmax(logits)."""
    masks = cnm_kernels.gaussian_mask(center, width, length, sigma=9)  # [B, K, G, length]
    return (logits.softmax(-1).unsqueeze(-1) * masks).sum(-2)


def main(steps: int = 300) -> tuple[float, float]:
    """Share of the attention's weight on the signal, before and after."""
    torch.manual_seed(0)
    x = torch.linspace(0, 1, FRAMES)
    signal = ((x > 0.1) & (x < 0.25)) | ((x > 0.6) & (x < 0.8))  # [FRAMES]
    rows = SENTENCES * PROPOSALS
    query, key = torch.randn(rows, HEADS, QUERIES, HEAD_DIM), torch.randn(rows, HEADS, FRAMES, HEAD_DIM)
    value = signal.float().view(1, 1, FRAMES, 1).expand(rows, HEADS, FRAMES, HEAD_DIM).contiguous()
    center = torch.logit(torch.linspace(0.1, 0.9, GAUSSIANS)).repeat(SENTENCES, PROPOSALS, 1).requires_grad_()
    width = torch.full((SENTENCES, PROPOSALS, GAUSSIANS), 1.0, requires_grad=True)
    logits = torch.zeros(SENTENCES, PROPOSALS, GAUSSIANS, requires_grad=True)
    optimizer = torch.optim.Adam([center, width, logits], 0.05)
    shares = []
    for step in range(steps + 1):
        weight = mixture(center.sigmoid(), width.sigmoid(), logits, FRAMES)  # [B, K, FRAMES]
        share = cnm_kernels.weighted_attention(query, key, value, weight).mean()
        shares.append(share.item())
        if step % 100 == 0:
            print(f"step {step}: {share.item():.3f} of the attention is on the signal", flush=True)
        optimizer.zero_grad()
        (-share.log()).backward()
        optimizer.step()
    print(f"centers of the first proposal: {[round(c, 2) for c in center.sigmoid()[0, 0].tolist()]}")
    return shares[0], shares[-1]


if __name__ == "__main__":
    main()
