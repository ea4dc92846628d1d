"""Attention, with a Gaussian over the keys and without: forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import cnm_kernels
from benchmarks import rivals
from benchmarks.op_case import Inputs, normal_like, op_case
from benchmarks.registry import Case, Contender, Goal, Table

ALPHA = 5.5
BF16 = torch.bfloat16


def gaussian_case(B: int, H: int, Lq: int, Lk: int, d: int, dtype: torch.dtype, causal: bool, *goals: Goal) -> Case:
    def inputs() -> Inputs:
        generator = torch.Generator().manual_seed(0)
        moment = {
            "center": torch.rand(B, generator=generator),
            "width": 0.15 + 0.85 * torch.rand(B, generator=generator),
        }
        return _qkv(generator, B, H, Lq, Lk, d, dtype) | moment | {"alpha": ALPHA, "causal": causal}

    return op_case(
        name=f"gaussian_attention {Lq}x{Lk}{' causal' if causal else ''}, B={B}",
        dtype=dtype,
        inputs=inputs,
        differentiable=("query", "key", "value", "center", "width"),
        upstream=lambda arguments: normal_like(arguments["query"]),
        ours=cnm_kernels.gaussian_attention,
        rivals={
            "eager": Contender(rivals.eager_gaussian_attention),
            "compile": Contender(rivals.eager_gaussian_attention, compiled=True),
            "SDPA, mask": Contender(rivals.sdpa_gaussian_attention),
            "R1": Contender(rivals.augmented_gaussian_attention),
        },
        goals=goals,
        **_work(B, H, Lq, Lk, d, dtype, causal),
    )


def plain_case(B: int, H: int, L: int, d: int, dtype: torch.dtype, *goals: Goal) -> Case:
    def inputs() -> Inputs:
        return _qkv(torch.Generator().manual_seed(0), B, H, L, L, d, dtype) | {"causal": True}

    return op_case(
        name=f"weighted_attention, no weights, {L}x{L} causal, B={B}",
        dtype=dtype,
        inputs=inputs,
        differentiable=("query", "key", "value"),
        upstream=lambda arguments: normal_like(arguments["query"]),
        ours=cnm_kernels.weighted_attention,
        rivals={
            "SDPA": Contender(rivals.sdpa_attention),
            "eager": Contender(rivals.eager_attention),
            "compile": Contender(rivals.eager_attention, compiled=True),
        },
        goals=goals,
        **_work(B, H, L, L, d, dtype, causal=True),
    )


def _qkv(generator: torch.Generator, B: int, H: int, Lq: int, Lk: int, d: int, dtype: torch.dtype) -> Inputs:
    shapes = {"query": (B, H, Lq, d), "key": (B, H, Lk, d), "value": (B, H, Lk, d)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def _work(B: int, H: int, Lq: int, Lk: int, d: int, dtype: torch.dtype, causal: bool) -> dict[str, Any]:
    """Two products forward and four backward over the pairs seen; every input read, every result written once."""
    pairs = Lq * (Lq + 1) / 2 if causal else Lq * Lk
    forward = 2 * Lq + 2 * Lk  # rows of q, out, k, v
    backward = 3 * Lq + 4 * Lk  # q, dout, dq; k, v, dk, dv
    return {"flops": 6 * 2 * B * H * pairs * d, "bytes": B * H * d * (forward + backward) * dtype.itemsize}


def cases(quick: bool) -> Sequence[Case]:
    B, H, d, batch = (4, 2, 16, 3) if quick else (384, 4, 64, 128)
    P, L, T = (7, 5, 18) if quick else (50, 20, 200)
    eager, r1 = Goal("time", "eager", 3), Goal("time", "R1", 4)
    return [
        gaussian_case(B, H, P, P, d, torch.float32, True, eager, r1),
        gaussian_case(B, H, L, P, d, torch.float32, False, eager),
        gaussian_case(B, H, P, P, d, BF16, True),
        gaussian_case(B, H, L, P, d, BF16, False),
        plain_case(batch, H, T, d, torch.float32, Goal("time", "SDPA", 1.5)),
        plain_case(batch, H, T, d, BF16, Goal("time", "SDPA", 4)),
    ]


TABLE = Table("attention", "Attention, forward and backward", cases)


def test_attention(benchmark: Any, call: Any) -> None:
    benchmark(call)
