"""logits_nll where logits are so large that they swallow the logarithm of the sum."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cnm_kernels.drop_in.logits_nll import logits_nll


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
