"""``branched_attention``: its record."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from op_records.anything import Anything
from op_records.draw import Builder, Draw, Inputs, misaligned, strided
from op_records.record import Record
from op_records.weighted_attention import any_attention, attention, extreme_logits, many_heads, weighted_attention


def branched(draw: Draw, n: int, B: int, H: int, Lq: int, Lk: int, d: int, **options: Any) -> Inputs:
    return attention(draw, B, H, Lq, Lk, d, **options) | {"key_weights": draw.uniform(n, B, Lk)}


def branched_attention(
    query: Tensor, key: Tensor, value: Tensor, key_weights: Tensor, **options: Any
) -> tuple[Tensor, ...]:
    """Every branch by itself."""
    branches = [weighted_attention(query, key, value, weights, **options)[0] for weights in key_weights.unbind(0)]
    return (torch.stack(branches),)


def many(draw: Draw) -> Inputs:
    return many_heads(draw) | {"key_weights": draw.uniform(3, 7, 101), "causal": True}


def fuzzed(some: Anything) -> Inputs:
    return any_attention(some) | {"key_weights": some.tensor(2, some.B, some.K)}


SAMPLES: dict[str, Builder] = {
    "plain": lambda draw: branched(draw, 3, 2, 2, 5, 7, 8),
    "one-branch": lambda draw: branched(draw, 1, 2, 2, 5, 7, 8),
    "clips-50": lambda draw: branched(draw, 3, 2, 4, 50, 50, 64, causal=True),
    "frames-150": lambda draw: branched(draw, 2, 1, 2, 150, 150, 64, causal=True),
    "lengths-0-1-odd-over": lambda draw: branched(draw, 2, 5, 2, 6, 7, 8, key_lengths=draw.lengths(0, 1, 5, 7, 9)),
    "empty-batch": lambda draw: branched(draw, 3, 0, 2, 3, 4, 8),
    "no-keys": lambda draw: branched(draw, 3, 2, 2, 3, 0, 8),
    "strided": lambda draw: strided(branched(draw, 3, 2, 2, 5, 7, 8)),
    "misaligned": lambda draw: misaligned(branched(draw, 3, 2, 2, 5, 7, 8, causal=True)),
    "extreme-logits": lambda draw: extreme_logits(branched(draw, 3, 2, 2, 5, 7, 8)),
}

RECORD = Record(
    reference=branched_attention,
    samples=SAMPLES,
    differentiable=("query", "key", "value", "key_weights"),
    autocast=("query", "key", "value"),
    typical=("plain", "lengths-0-1-odd-over"),
    large=("clips-50", "frames-150"),
    smooth=("plain",),
    valid="lengths-0-1-odd-over",
    integers=("key_lengths",),
    own_dtype=("key_weights",),
    in_use="plain",
    many=many,
    fuzzed=fuzzed,
    ill_conditioned=True,
)
