"""Cross attention of a layer, projections included: few words and many frames, as CNM's decoders have it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import rivals
from benchmarks.op_case import Inputs, normal_like, op_case
from benchmarks.registry import Case, Contender, Table
from cnm.models.layers import MultiheadAttention
from cnm_kernels.absorption import Source
from cnm_kernels.constants import KEY_WEIGHT_EPS

PARAMETERS = ("in_proj_weight", "in_proj_bias", "out_weight", "out_bias")


class CrossAttention(nn.Module):
    """The layer as ``cnm`` computes it, on parameters that a call brings along."""

    def __init__(self, D: int, H: int, minimize_flops: bool) -> None:
        super().__init__()
        self.attention = MultiheadAttention(D, H)
        self.minimize_flops = minimize_flops

    def forward(self, states: Tensor, key_weight: Tensor | None, x: Tensor) -> Tensor:
        lengths = torch.full(states.shape[:1], states.size(1))
        return self.attention.attend_to(Source(states, lengths, key_weight), x, minimize_flops=self.minimize_flops)


def ours(minimize_flops: bool, D: int, H: int) -> Any:
    layer = CrossAttention(D, H, minimize_flops)

    def function(x: Tensor, states: Tensor, key_weight: Tensor | None, **parameters: Tensor) -> Tensor:
        names = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
        given = {f"attention.{name}": parameters[key] for name, key in zip(names, PARAMETERS, strict=True)}
        result: Tensor = torch.func.functional_call(layer, given, (states, key_weight, x))
        return result

    return function


def composed(fused: bool, H: int) -> Any:
    """PyTorch's parts: the published formulation, or SDPA and R1."""

    def function(x: Tensor, states: Tensor, key_weight: Tensor | None, **parameters: Tensor) -> Tensor:
        D = x.size(-1)
        weight, bias, out_weight, out_bias = (parameters[name].to(x.dtype) for name in PARAMETERS)
        query = F.linear(x, weight[:D], bias[:D]).unflatten(-1, (H, -1)).transpose(1, 2)
        key, value = F.linear(states, weight[D:], bias[D:]).unflatten(-1, (2, H, -1)).permute(2, 0, 3, 1, 4)
        if not fused:
            scores = torch.matmul(query * query.size(-1) ** -0.5, key.transpose(-1, -2))
            probabilities = F.softmax(scores, dim=-1)
            if key_weight is not None:
                weighted = probabilities * (key_weight.to(x.dtype) + KEY_WEIGHT_EPS)[:, None, None, :]
                probabilities = weighted / weighted.sum(-1, keepdim=True)
            out = torch.matmul(probabilities, value)
        elif key_weight is None:
            out = F.scaled_dot_product_attention(query, key, value)
        else:
            out = rivals.sdpa_with_key_bias(query, key, value, torch.log(key_weight + KEY_WEIGHT_EPS), False)
        return F.linear(out.transpose(1, 2).flatten(2), out_weight, out_bias)

    return function


def make(name: str, B: int, Lq: int, Lk: int, D: int, H: int, dtype: torch.dtype, weighted: bool) -> Case:
    def inputs() -> Inputs:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return scale * torch.randn(shape, generator=generator)

        return {
            "x": normal(B, Lq, D).to(dtype),
            "states": normal(B, Lk, D).to(dtype),
            "key_weight": torch.rand(B, Lk, generator=generator) if weighted else None,
            "in_proj_weight": normal(3 * D, D, scale=D**-0.5),
            "in_proj_bias": normal(3 * D),
            "out_weight": normal(D, D, scale=D**-0.5),
            "out_bias": normal(D),
        }

    products = 2 * (Lq + Lk) * D * D + 2 * Lq * Lk * D  # with both sides projected; backward twice that
    return op_case(
        name=f"{name}, {Lq}x{Lk} of {D}, B={B}",
        dtype=dtype,
        inputs=inputs,
        differentiable=("x", "states", *PARAMETERS, *(("key_weight",) if weighted else ())),
        upstream=lambda arguments: normal_like(arguments["x"]),
        ours=ours(True, D, H),
        rivals={
            "both sides projected": Contender(ours(False, D, H)),
            "eager": Contender(composed(False, H)),
            "compile": Contender(composed(False, H), compiled=True),
            "R1" if weighted else "SDPA": Contender(composed(True, H)),
        },
        flops=3 * 2 * B * products,
    )


def cases(quick: bool) -> Sequence[Case]:
    B, T, P, L, D, H = (3, 12, 7, 5, 16, 2) if quick else (128, 200, 50, 13, 256, 4)
    return [
        case
        for dtype in (torch.float32, torch.bfloat16)
        for case in (
            make("frames ask words", B, T, L + 1, D, H, dtype, False),
            make("words ask weighted clips", 3 * B, L, P, D, H, dtype, True),
        )
    ]


TABLE = Table("cross_attention", "Cross attention with its projections, forward and backward", cases)


def test_cross_attention(benchmark: Any, call: Any) -> None:
    benchmark(call)
