"""Dropout of the model's inputs: forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import cnm_kernels
from benchmarks import rivals
from benchmarks.op_case import Inputs, Result, normal_like, op_case
from benchmarks.random_masks import P_DROP, kept_by
from benchmarks.registry import Case, Contender, Table


def dropout_case(rows: int, D: int, dtype: torch.dtype) -> Case:
    def inputs() -> Inputs:
        generator = torch.Generator().manual_seed(0)
        return {"x": torch.randn(rows, D, generator=generator).to(dtype), "p": P_DROP}

    def recover(inputs: Inputs, result: Result) -> Inputs:
        return {"kept": kept_by(result[1][0])}

    def reference(x: Tensor, p: float, kept: Tensor) -> Tensor:
        return x * kept / (1 - p)

    return op_case(
        name=f"dropout {rows}x{D}",
        dtype=dtype,
        inputs=inputs,
        differentiable=("x",),
        upstream=lambda arguments: normal_like(arguments["x"]),
        ours=lambda x, p: cnm_kernels.dropout(x, p, seed=7),
        recover=recover,
        reference=reference,
        rivals={
            "eager": Contender(rivals.eager_dropout),
            "compile": Contender(rivals.eager_dropout, compiled=True),
        },
        bytes=rows * D * dtype.itemsize * 4,  # x, out; dout, dx
    )


def cases(quick: bool) -> Sequence[Case]:
    rows, D = (96, 32) if quick else (25600, 1024)  # frames of 128 videos, I3D features
    return [dropout_case(rows, D, dtype) for dtype in (torch.float32, torch.bfloat16)]


TABLE = Table("dropout", "Dropout, forward and backward", cases)


def test_dropout(benchmark: Any, call: Any) -> None:
    benchmark(call)
