"""logits_nll beside PyTorch's cross entropy; also where logits swallow the logarithm of the sum."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cnm_kernels.drop_in.logits_nll import logits_nll


def draw(*shape: int, seed: int) -> Tensor:
    """Numbers that bfloat16 holds, in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).bfloat16().double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("size", [2.0**12, 2.0**28, 2.0**100], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_ties(dtype: torch.dtype, size: float, smoothing: float) -> None:
    generator = torch.Generator().manual_seed(1)
    signs = torch.randint(2, (7, 1112), generator=generator) * 2 - 1
    target = torch.randint(1112, (7,), generator=generator)
    logits = (signs * size).to(dtype).requires_grad_()
    wide = logits.detach().double().requires_grad_()
    nll, _ = logits_nll(logits, target, smoothing)
    exact = nn.functional.cross_entropy(wide, target, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(nll.double(), exact, rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(nll.sum(), logits)
    (wanted,) = torch.autograd.grad(exact.sum(), wide)
    close = 1e-6 if dtype != torch.bfloat16 else 2**-8
    torch.testing.assert_close(gradient.double(), wanted, rtol=close, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (3000, 101), (0, 4), (2, 200_000)])
def test_the_cross_entropy_of_given_logits(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Several blocks of rows, one, none, and rows longer than a block; extreme logits."""
    N, V = shape
    logits = (30 * draw(N, V, seed=1)).to(dtype).requires_grad_()
    target = torch.randint(V, (N,), generator=torch.Generator().manual_seed(2))
    nll, correct = logits_nll(logits, target, 0.1)
    wide = logits.detach().double().requires_grad_()
    exact = nn.functional.cross_entropy(wide, target, reduction="none", label_smoothing=0.1)
    assert nll.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(nll.double(), exact, rtol=1e-6, atol=1e-4)
    assert torch.equal(correct, logits.argmax(-1) == target)
    upstream = draw(N, seed=3)
    (gradient,) = torch.autograd.grad(nll, logits, upstream.to(nll))
    (wanted,) = torch.autograd.grad(exact, wide, upstream)
    assert gradient.dtype == dtype
    rounding = (
        torch.finfo(nll.dtype).eps * logits.detach().abs().max().item() if N else 0.0
    )  # of z - lse, in exp(z - lse)
    rounding += torch.finfo(dtype).eps
    torch.testing.assert_close(gradient.double(), wanted, rtol=4 * rounding, atol=rounding)
