"""A linear layer against PyTorch's own, forward and backward, at the shapes of both models and at wider ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import cnm_kernels
from benchmarks.op_case import Inputs, normal_like, op_case
from benchmarks.registry import Case, Contender, Goal, Table

# rows, inputs, outputs: frames of 128 videos through the feed-forward layer and their projection; words; wider models
SHAPES = ((25600, 256, 1024), (25600, 1024, 256), (1664, 256, 768), (6400, 512, 512), (6400, 1024, 1024))
TINY = ((96, 32, 64), (96, 64, 32), (12, 32, 96), (32, 40, 40), (32, 72, 72))


def linear_case(rows: int, K: int, M: int, dtype: torch.dtype) -> Case:
    def inputs() -> Inputs:
        generator = torch.Generator().manual_seed(0)
        shapes = {"x": (rows, K), "weight": (M, K), "bias": (M,)}
        return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}

    def upstream(arguments: Inputs) -> tuple[Tensor]:
        return normal_like(arguments["x"].new_empty(rows, M))

    return op_case(
        name=f"linear {rows}x{K}x{M}",
        dtype=dtype,
        inputs=inputs,
        differentiable=("x", "weight", "bias"),
        upstream=upstream,
        ours=cnm_kernels.linear,
        rivals={"F.linear": Contender(F.linear)},
        goals=(Goal("time", "F.linear", 1),),
        flops=6 * rows * K * M,
    )


def cases(quick: bool) -> Sequence[Case]:
    return [
        linear_case(*shape, dtype) for shape in (TINY if quick else SHAPES) for dtype in (torch.float32, torch.bfloat16)
    ]


TABLE = Table("linear", "Linear layers, forward and backward", cases)


def test_linear(benchmark: Any, call: Any) -> None:
    benchmark(call)
