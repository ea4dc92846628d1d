"""LayerNorm(residual + dropout(x)): forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import cnm_kernels
from benchmarks import rivals
from benchmarks.op_case import Inputs, Result, normal_like, op_case
from benchmarks.random_masks import P_DROP, kept_by
from benchmarks.registry import Case, Contender, Goal, Table


def layer_norm_case(rows: int, D: int, dtype: torch.dtype, *goals: Goal) -> Case:
    def inputs() -> Inputs:
        generator = torch.Generator().manual_seed(0)
        x, residual = (torch.randn(rows, D, generator=generator).to(dtype) for _ in range(2))
        weight, bias = 1 + 0.1 * torch.randn(D, generator=generator), 0.1 * torch.randn(D, generator=generator)
        return {"x": x, "residual": residual, "weight": weight, "bias": bias, "p": P_DROP}

    def recover(inputs: Inputs, result: Result) -> Inputs:
        return {"kept": kept_by(result[1][0])}

    def reference(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, p: float, kept: Tensor) -> Tensor:
        return F.layer_norm(residual + x * kept / (1 - p), x.shape[-1:], weight, bias)

    return op_case(
        name=f"dropout_add_layer_norm {rows}x{D}",
        dtype=dtype,
        inputs=inputs,
        differentiable=("x", "residual", "weight", "bias"),
        upstream=lambda arguments: normal_like(arguments["x"]),
        ours=lambda **arguments: cnm_kernels.dropout_add_layer_norm(**arguments, seed=7),
        recover=recover,
        reference=reference,
        rivals={
            "eager": Contender(rivals.eager_dropout_add_layer_norm),
            "compile": Contender(rivals.eager_dropout_add_layer_norm, compiled=True),
        },
        goals=goals,
        bytes=rows * D * dtype.itemsize * 8,  # x, residual, out; x, residual, dout, dx, dresidual
    )


def cases(quick: bool) -> Sequence[Case]:
    rows, D = (96, 32) if quick else (25600, 256)
    return [
        layer_norm_case(rows, D, torch.float32, Goal("time", "eager", 6)),
        layer_norm_case(rows, D, torch.bfloat16),
    ]


TABLE = Table("layer_norm", "Dropout, residual and LayerNorm, forward and backward", cases)


def test_layer_norm(benchmark: Any, call: Any) -> None:
    benchmark(call)
