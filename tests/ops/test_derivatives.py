"""Second and forward-mode derivatives are right (plain PyTorch) or refused aloud, never wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from samples import DIFFERENTIABLE, Inputs, cases, run, sample
from test_every_op import TYPICAL
from torch import Tensor

ARGUMENTS = ("op", "name", "backend", "device", "dtype")
ONE_EACH = {op: names[:1] for op, names in TYPICAL.items() if op not in ("dropout", "linear")}  # these are linear


def _function(op: str, inputs: Inputs, backend: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Of the first differentiable input."""
    name = DIFFERENTIABLE[op][0]

    def function(x: Tensor) -> Tensor:
        return run(op, inputs | {name: x * x}, backend)[0].square().sum()

    return function, inputs[name]


@pytest.mark.parametrize(ARGUMENTS, cases(ONE_EACH, [torch.float32]))
def test_a_second_derivative(op: str, name: str, backend: str, device: str, dtype: torch.dtype) -> None:
    function, x = _function(op, sample(op, name, dtype, device), backend)
    x = x.detach().requires_grad_()
    (first,) = torch.autograd.grad(function(x), x, create_graph=True)
    if backend == "torch":
        torch.autograd.grad(first.sum(), x)
        return
    with pytest.raises(NotImplementedError, match="is differentiable once"):
        torch.autograd.grad(first.sum(), x, retain_graph=True)
    with pytest.raises(NotImplementedError, match="is differentiable once"):
        first.sum().backward()


@pytest.mark.parametrize(ARGUMENTS, cases(ONE_EACH, [torch.float32]))
def test_forward_mode(op: str, name: str, backend: str, device: str, dtype: torch.dtype) -> None:
    function, x = _function(op, sample(op, name, dtype, device), backend)
    if backend == "torch":
        torch.func.jvp(function, (x,), (torch.ones_like(x),))
        return
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(function, (x,), (torch.ones_like(x),))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        function(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
