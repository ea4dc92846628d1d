"""Shared by the tests of ``accelerate(model)``.

The research code of ``examples/research_code`` runs beside an accelerated copy of itself, without dropout, from one
seed. Bounds on ||difference|| / ||value||: float64 1e-9; float32 1e-5 against the plain copy in float64 (it may be
nearer to it than the plain copy in float32 is); in bfloat16 four times what the plain copy errs against float64.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from samples import targets
from torch import Tensor, nn

from benchmarks.bench_accelerate import CNM, CPL, tiny

D, H, B = 32, 4, 3
BOUND = {torch.float64: 1e-9, torch.float32: 1e-5}
TIMES_PLAIN = 4
EXPERIMENTS = {"CNM": tiny(CNM), "CPL": tiny(CPL)}
EVERYWHERE = targets("weighted_attention", (torch.float64, torch.float32, torch.bfloat16), large=True)
FUTURE = torch.full((5, 5), -torch.inf).triu(1)
PREFIX = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 1, 1, 1, 1]])


def generators() -> tuple[Any, ...]:
    """The states of Python's, NumPy's and PyTorch's generators, to be compared."""
    numpy = np.random.get_state()  # noqa: NPY002
    return random.getstate(), numpy[1].tolist(), numpy[2:], torch.get_rng_state().tolist()


def error(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Largest ||found - wanted|| / ||wanted||."""
    return max(
        ((mine.double() - other.double()).norm() / other.double().norm().clamp_min(1e-30)).item()
        for mine, other in zip(found, wanted, strict=True)
    )


def assert_as_good(found: list[Tensor], plain: list[Tensor], exact: list[Tensor]) -> None:
    """``found`` is what ``plain`` is, and near enough to ``exact``, the same in float64."""
    assert [tensor.shape for tensor in found] == [tensor.shape for tensor in plain]
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in plain]
    dtype = plain[0].dtype
    if dtype in BOUND:
        assert error(found, exact) <= BOUND[dtype]
    else:
        rounding = torch.finfo(dtype).eps
        for mine, other, want in zip(found, plain, exact, strict=True):
            assert error([mine], [want]) <= TIMES_PLAIN * error([other], [want]) + rounding


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Numbers that bfloat16 holds, in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16().double()


def module_in(kind: Callable[[], nn.Module], dtype: torch.dtype, device: str) -> nn.Module:
    torch.manual_seed(0)
    return kind().bfloat16().to(device, dtype)


def differentiate(call: Callable[[], Any], inputs: list[Tensor]) -> list[Tensor]:
    """Outputs (attention included) and the gradients of all of them to ``inputs``."""
    outputs = [output for output in call() if output is not None]
    upstream = [draw(*output.shape, seed=9).to(output) for output in outputs]
    found = torch.autograd.grad(outputs, inputs, upstream, allow_unused=True)
    return [*(output.detach() for output in outputs), *(d for d in found if d is not None)]
