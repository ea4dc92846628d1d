"""``weighted_attention``: its record."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from op_records.anything import Anything
from op_records.draw import Builder, Draw, Inputs, heads_last, misaligned, strided
from op_records.record import Record


def attention(draw: Draw, B: int, H: int, Lq: int, Lk: int, d: int, **options: Any) -> Inputs:
    shapes = {"query": (B, H, Lq, d), "key": (B, H, Lk, d), "value": (B, H, Lk, d)}
    return {name: draw.normal(*shape) for name, shape in shapes.items()} | options


def weighted(draw: Draw, B: int, H: int, Lq: int, Lk: int, d: int, **options: Any) -> Inputs:
    return attention(draw, B, H, Lq, Lk, d, **options) | {"key_weight": draw.uniform(B, Lk)}


def zero_rows(inputs: Inputs) -> Inputs:
    key_weight = inputs["key_weight"].clone()
    key_weight[0] = 0
    key_weight[1, ::2] = 0
    return inputs | {"key_weight": key_weight}


def weightless_keys_ahead(inputs: Inputs) -> Inputs:
    """Keys of weight 0 lead by 23 = -log(1e-10), so that the 1e-10 added to every weight decides."""
    key, key_weight = torch.zeros_like(inputs["key"]), torch.ones_like(inputs["key_weight"])
    key[:, :, ::2] = 1
    key_weight[:, ::2] = 0
    return inputs | {"query": torch.ones_like(inputs["query"]), "key": key, "key_weight": key_weight, "scale": 23 / 8}


def extreme_logits(inputs: Inputs) -> Inputs:
    """Scores of +-1e4, from entries that float16 holds."""
    query, key = torch.full_like(inputs["query"], 50.0), torch.full_like(inputs["key"], 50.0)
    key[:, :, ::2] *= -1
    key[:, :, -1] *= 0.5
    return inputs | {"query": query, "key": key, "scale": 1e4 / (2500 * query.size(-1))}


ATTENTION_SHAPES: dict[str, Callable[[Callable[..., Inputs]], Builder]] = {
    "plain": lambda make: lambda draw: make(draw, 2, 2, 5, 7, 8),
    "causal": lambda make: lambda draw: make(draw, 2, 4, 13, 13, 16, causal=True),
    "causal-more-keys": lambda make: lambda draw: make(draw, 1, 2, 4, 9, 8, causal=True),
    "causal-more-queries": lambda make: lambda draw: make(draw, 1, 2, 9, 4, 8, causal=True),
    "lengths-0-1-odd-over": lambda make: (
        lambda draw: make(draw, 5, 2, 6, 7, 8, key_lengths=draw.lengths(0, 1, 5, 7, 9))
    ),
    "causal-lengths": lambda make: (
        lambda draw: make(draw, 3, 2, 17, 17, 33, causal=True, key_lengths=draw.lengths(17, 1, 6))
    ),
    "three-heads": lambda make: lambda draw: make(draw, 2, 3, 5, 6, 7),
    "scale": lambda make: lambda draw: make(draw, 2, 2, 5, 7, 8, scale=0.3),
    "all-ones": lambda make: lambda draw: make(draw, 1, 1, 1, 1, 1),
    "one-key": lambda make: lambda draw: make(draw, 2, 2, 3, 1, 8),
    "empty-batch": lambda make: lambda draw: make(draw, 0, 2, 3, 4, 8),
    "no-queries": lambda make: lambda draw: make(draw, 2, 2, 0, 4, 8),
    "no-keys": lambda make: lambda draw: make(draw, 2, 2, 3, 0, 8),
    "frames-200": lambda make: lambda draw: make(draw, 1, 4, 200, 200, 64, causal=True, key_lengths=draw.lengths(171)),
    "clips-50": lambda make: lambda draw: make(draw, 2, 4, 50, 50, 64, causal=True),
    "words-20-clips-50": lambda make: lambda draw: make(draw, 2, 4, 20, 50, 64, key_lengths=draw.lengths(50, 23)),
    "strided": lambda make: lambda draw: strided(make(draw, 2, 2, 5, 7, 8)),
    "misaligned": lambda make: lambda draw: misaligned(make(draw, 2, 2, 5, 7, 8, causal=True)),
    "heads-last": lambda make: lambda draw: heads_last(make(draw, 2, 2, 5, 7, 8)),
    "extreme-logits": lambda make: lambda draw: extreme_logits(make(draw, 2, 2, 5, 7, 8)),
}


def weights_of_heads(
    query: Tensor,
    key: Tensor,
    key_weight: Tensor | None = None,
    causal: bool = False,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(s + log(m + 1e-10)), by an explicit bias; queries that see no key give zeros."""
    B, _, Lq, d = query.shape
    Lk = key.size(2)
    scores = torch.einsum("bhid,bhjd->bhij", query, key) * (d**-0.5 if scale is None else scale)
    if key_weight is not None:
        scores = scores + torch.log(key_weight.to(query.dtype) + 1e-10)[:, None, None, :]
    hidden = torch.zeros(B, 1, Lq, Lk, dtype=torch.bool, device=query.device)
    for b in range(B):
        for i in range(Lq):
            for_lengths = Lk if key_lengths is None else min(int(key_lengths[b]), Lk)
            last = min(i + 1, for_lengths) if causal else for_lengths
            hidden[b, 0, i, last:] = True
    probability = torch.softmax(scores.masked_fill(hidden, -1e30), -1)  # uniform where all is hidden: zeroed next
    return probability.masked_fill(hidden, 0)


def weighted_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_weight: Tensor | None = None,
    causal: bool = False,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    """The values by the weights of each head."""
    probability = weights_of_heads(query, key, key_weight, causal, key_lengths, scale)
    return (torch.einsum("bhij,bhjd->bhid", probability, value),)


def many_heads(draw: Draw) -> Inputs:
    return {name: draw.normal(7, 3, 101, 40) for name in ("query", "key", "value")}


def any_attention(some: Anything) -> Inputs:
    return {
        "query": some.tensor(some.B, some.H, some.L, some.d),
        "key": some.tensor(some.B, some.H, some.K, some.d),
        "value": some.tensor(some.B, some.H, some.K, some.d),
        "causal": some.choice(False, True),
        "key_lengths": some.choice(None, some.integers(some.K + 1, some.B)),
    }


def fuzzed(some: Anything) -> Inputs:
    return any_attention(some) | {"key_weight": some.choice(None, some.tensor(some.B, some.K))}


SAMPLES: dict[str, Builder] = {
    **{f"unweighted-{name}": make(attention) for name, make in ATTENTION_SHAPES.items()},
    **{f"weighted-{name}": make(weighted) for name, make in ATTENTION_SHAPES.items()},
    "zero-weights": lambda draw: zero_rows(weighted(draw, 2, 2, 5, 7, 8)),
    "weightless-keys-ahead": lambda draw: weightless_keys_ahead(weighted(draw, 2, 2, 5, 7, 8)),
    "zero-weights-extreme-logits": lambda draw: zero_rows(extreme_logits(weighted(draw, 2, 2, 5, 7, 8))),
    "weights-in-float32": lambda draw: (
        attention(draw, 2, 2, 5, 7, 8)
        | {"key_weight": draw.uniform(2, 7).to(torch.promote_types(draw.dtype, torch.float32))}
        if draw.dtype != torch.float64
        else weighted(draw, 2, 2, 5, 7, 8)
    ),
}

RECORD = Record(
    reference=weighted_attention,
    samples=SAMPLES,
    differentiable=("query", "key", "value", "key_weight"),
    autocast=("query", "key", "value"),
    typical=("weighted-causal-lengths",),
    large=("weighted-frames-200", "unweighted-frames-200", "weighted-words-20-clips-50"),
    smooth=("weighted-three-heads", "weighted-lengths-0-1-odd-over", "unweighted-causal-more-keys"),
    valid="weighted-causal-lengths",
    integers=("key_lengths",),
    own_dtype=("key_weight",),
    in_use="weighted-causal",
    many=many_heads,
    fuzzed=fuzzed,
    ill_conditioned=True,
)
