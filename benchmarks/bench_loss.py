"""Contrastive reconstruction loss of the three branches: forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import cnm_kernels
from benchmarks import rivals
from benchmarks.op_case import Inputs, op_case
from benchmarks.registry import Case, Contender, Goal, Table

# How much of its target's vector a negative's state holds: so much that every hinge is active and no row's gradient is
# zero but the padding's, which would be too easy for ours.
HINT = 2.0
LOGITS_SHARE = 20  # working memory at most this fraction of the logits


def loss_case(B: int, L: int, D: int, V: int, dtype: torch.dtype, all_valid: bool, *goals: Goal) -> Case:
    lengths = torch.full((B,), L)
    if not all_valid:  # uniform from 5 to 17 of 20 words, 55% on average
        generator = torch.Generator().manual_seed(2)
        lengths = torch.randint(L // 4, L - L // 6 + 1, (B,), generator=generator)
    rows = 3 * int(lengths.sum())

    def inputs() -> Inputs:
        generator = torch.Generator().manual_seed(0)
        weight = D**-0.5 * torch.randn(V, D, generator=generator)
        target = torch.randint(V, (B, L), generator=generator)
        hidden = torch.randn(3, B, L, D, generator=generator)
        hidden[1:] += HINT * weight[target]
        return {
            "hidden": hidden.to(dtype),
            "weight": weight.to(dtype),
            "bias": (0.1 * torch.randn(V, generator=generator)).to(dtype),
            "target": target,
            "valid_lengths": lengths,
        }

    def upstream(arguments: Inputs) -> tuple[torch.Tensor | None, ...]:
        wide = torch.float64 if arguments["hidden"].dtype == torch.float64 else torch.float32
        return torch.ones((), dtype=wide), None

    padded = not all_valid
    missing = rivals.LINEAR_CROSS_ENTROPY_MISSING
    contenders = {
        "eager": Contender(rivals.eager_loss),
        **({"eager, valid rows": Contender(rivals.eager_loss_packed)} if padded else {}),
        "compile": Contender(rivals.eager_loss, compiled=True),
        "R2": Contender(rivals.linear_cross_entropy_loss, unavailable=missing),
        **(
            {"R2, valid rows": Contender(rivals.linear_cross_entropy_loss_packed, unavailable=missing)}
            if padded
            else {}
        ),
        "R2, chunked": Contender(rivals.chunked_linear_cross_entropy_loss, unavailable=missing),
        **({"eager float32": Contender(rivals.eager_loss, dtype=torch.float32)} if dtype != torch.float32 else {}),
        "products alone": Contender(rivals.linear_products, bound=True),
    }
    logits = 3 * B * L * V * dtype.itemsize
    return op_case(
        name=f"contrastive_reconstruction_loss, {3 * B * L} rows, {rows / (3 * B * L):.0%} valid, V={V}",
        dtype=dtype,
        inputs=inputs,
        differentiable=("hidden", "weight", "bias"),
        upstream=upstream,
        ours=cnm_kernels.contrastive_reconstruction_loss,
        rivals=contenders,
        goals=(*goals, Goal("memory", f"1/{LOGITS_SHARE} of the logits", logits / LOGITS_SHARE)),
        flops=3 * 2 * rows * V * D,
    )


def cases(quick: bool) -> Sequence[Case]:
    B, L, D = (3, 12, 16) if quick else (128, 20, 256)
    vocabularies = (37, 61) if quick else (1112, 8001)  # Charades-STA, ActivityNet
    found = []
    for all_valid in (False, True):
        for dtype in (torch.float32, torch.bfloat16):
            bound = 4 if dtype == torch.bfloat16 else 1.2
            goals = [Goal("time", rival, bound if all_valid else 2) for rival in ("eager", "R2")]
            if dtype == torch.bfloat16 and not all_valid:
                goals = []
            found += [loss_case(B, L, D, V, dtype, all_valid, *goals) for V in vocabularies]
    return found


TABLE = Table("loss", "Contrastive reconstruction loss, forward and backward", cases)


def test_loss(benchmark: Any, call: Any) -> None:
    benchmark(call)
