"""``attention_weights``: its record."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from op_records.anything import Anything
from op_records.draw import Builder, Draw, Inputs
from op_records.record import Record
from op_records.weighted_attention import (
    ATTENTION_SHAPES,
    any_attention,
    attention,
    weighted,
    weights_of_heads,
    zero_rows,
)


def scored(draw: Draw, *sizes: int, **options: Any) -> Inputs:
    """Queries and keys alone."""
    return {name: value for name, value in attention(draw, *sizes, **options).items() if name != "value"}


def weighted_scored(draw: Draw, *sizes: int, **options: Any) -> Inputs:
    return {name: value for name, value in weighted(draw, *sizes, **options).items() if name != "value"}


def attention_weights(query: Tensor, key: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, ...]:
    """The mean over the heads."""
    return (weights_of_heads(query, key, *arguments, **options).sum(1) / query.size(1),)


def many(draw: Draw) -> Inputs:
    return {name: draw.normal(7, 3, 101, 40) for name in ("query", "key")}


def fuzzed(some: Anything) -> Inputs:
    arguments = any_attention(some) | {"key_weight": some.choice(None, some.tensor(some.B, some.K))}
    return {name: value for name, value in arguments.items() if name != "value"}


SAMPLES: dict[str, Builder] = {
    **{f"unweighted-{name}": make(scored) for name, make in ATTENTION_SHAPES.items()},
    **{f"weighted-{name}": make(weighted_scored) for name, make in ATTENTION_SHAPES.items()},
    "zero-weights": lambda draw: zero_rows(weighted_scored(draw, 2, 2, 5, 7, 8)),
}

RECORD = Record(
    reference=attention_weights,
    samples=SAMPLES,
    differentiable=("query", "key", "key_weight"),
    autocast=("query", "key"),
    typical=("weighted-causal-lengths",),
    large=("weighted-frames-200", "unweighted-frames-200"),
    smooth=("weighted-three-heads", "weighted-lengths-0-1-odd-over", "unweighted-causal-more-keys"),
    valid="weighted-causal-lengths",
    integers=("key_lengths",),
    own_dtype=("key_weight",),
    in_use="weighted-causal",
    many=many,
    fuzzed=fuzzed,
)
