"""``absorbed_attention``: its record."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from op_records.anything import Anything
from op_records.draw import Builder, Draw, Inputs, misaligned, strided
from op_records.linear import padded
from op_records.record import Record
from op_records.weighted_attention import zero_rows


def absorbed(draw: Draw, B: int, H: int, Lq: int, Lk: int, D: int, **options: Any) -> Inputs:
    """Many queries and few keys: a bias and no weight."""
    return {
        "query": draw.normal(B, Lq, D),
        "key": draw.normal(B, H, Lk, D),
        "value": draw.normal(B, H, Lk, D),
        "key_bias": draw.normal(B, H, Lk),
        "scale": D**-0.5,
    } | options


def absorbed_queries(draw: Draw, B: int, Lq: int, Lk: int, D: int, **options: Any) -> Inputs:
    """Few queries and many keys: a weight, and keys that are the values."""
    return {
        "query": draw.normal(B, Lq, D),
        "key": draw.normal(B, 1, Lk, D),
        "key_weight": draw.uniform(B, Lk),
        "scale": D**-0.5,
    } | options


def query_padding(inputs: Inputs) -> Inputs:
    queries = padded({"x": inputs["query"]}, inputs["query_lengths"])
    return inputs | {"query": queries["x"]}


def absorbed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor | None = None,
    *,
    scale: float,
    key_bias: Tensor | None = None,
    key_weight: Tensor | None = None,
    query_lengths: Tensor | None = None,
    key_lengths: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Sample by sample and head by head, on what is real of each."""
    value = key if value is None else value
    outs = []
    for b, (q, keys, values) in enumerate(zip(query, key, value, strict=True)):
        queries = len(q) if query_lengths is None else min(int(query_lengths[b]), len(q))
        n = key.size(2) if key_lengths is None else min(int(key_lengths[b]), key.size(2))
        out = torch.zeros_like(q[:queries])
        for h in range(len(keys)):
            scores = q[:queries] @ keys[h, :n].T * scale
            if key_bias is not None:
                scores = scores + key_bias[b, h, :n].to(q.dtype)
            if key_weight is not None:
                scores = scores + torch.log(key_weight[b, :n].to(q.dtype) + 1e-10)
            out = out + torch.softmax(scores, -1) @ values[h, :n]
        outs.append(torch.cat([out, q.new_zeros(len(q) - queries, q.size(1))]))
    return (torch.stack(outs) if outs else query * key.sum() * value.sum(),)


def many(draw: Draw) -> Inputs:
    lengths = {"query_lengths": draw.integers(102, 23), "key_lengths": draw.integers(9, 23)}
    return absorbed(draw, 23, 3, 101, 8, 120, **lengths)


def fuzzed(some: Anything) -> Inputs:
    return {
        "query": some.tensor(some.B, some.L, some.d),
        "key": some.tensor(some.B, some.H, some.K, some.d),
        "value": some.choice(None, some.tensor(some.B, some.H, some.K, some.d)),
        "scale": some.number(0.5),
        "key_bias": some.choice(None, some.tensor(some.B, some.H, some.K)),
        "key_weight": some.choice(None, some.tensor(some.B, some.K)),
        "query_lengths": some.choice(None, some.integers(some.L + 1, some.B)),
        "key_lengths": some.choice(None, some.integers(some.K + 1, some.B)),
    }


SAMPLES: dict[str, Builder] = {
    "plain": lambda draw: absorbed(draw, 2, 3, 5, 7, 8),
    "weighted": lambda draw: absorbed(draw, 2, 2, 5, 6, 8, key_weight=draw.uniform(2, 6)),
    "keys-are-values": lambda draw: absorbed_queries(draw, 3, 5, 7, 8),
    "heads-of-keys-that-are-values": lambda draw: absorbed(draw, 2, 3, 5, 7, 8) | {"value": None},
    "lengths-0-1-odd-over": lambda draw: (
        absorbed(
            draw, 5, 2, 6, 7, 8, query_lengths=draw.lengths(6, 2, 0, 9, 5), key_lengths=draw.lengths(0, 1, 5, 7, 9)
        )
        | {"key_weight": draw.uniform(5, 7)}
    ),
    "frames-200-words-14": lambda draw: absorbed(draw, 2, 4, 200, 14, 256, key_lengths=draw.lengths(14, 5)),
    "words-13-clips-50": lambda draw: absorbed_queries(
        draw, 3, 52, 50, 256, query_lengths=draw.lengths(52, 12, 28), key_lengths=draw.lengths(50, 23, 1)
    ),
    "one-query-frames-200": lambda draw: absorbed_queries(draw, 2, 4, 200, 256) | {"key_weight": None},
    "odd": lambda draw: absorbed(draw, 3, 5, 57, 3, 37, query_lengths=draw.lengths(57, 50, 49)),
    "many-keys": lambda draw: absorbed(draw, 1, 2, 9, 301, 24),
    "all-ones": lambda draw: absorbed(draw, 1, 1, 1, 1, 1),
    "empty-batch": lambda draw: absorbed(draw, 0, 2, 3, 4, 8),
    "no-queries": lambda draw: absorbed(draw, 2, 2, 0, 4, 8),
    "no-keys": lambda draw: absorbed(draw, 2, 2, 3, 0, 8),
    "zero-weights": lambda draw: zero_rows(absorbed_queries(draw, 2, 5, 7, 8)),
    "extreme-scores": lambda draw: absorbed(draw, 2, 2, 5, 7, 8, scale=1e4),
    "strided": lambda draw: strided(absorbed(draw, 2, 2, 5, 7, 8)),
    "misaligned": lambda draw: misaligned(absorbed(draw, 2, 2, 5, 7, 8)),
    "heads-last": lambda draw: (
        absorbed(draw, 2, 2, 5, 7, 8) | {name: draw.normal(2, 7, 2, 8).transpose(1, 2) for name in ("key", "value")}
    ),
    "anything-in-padding": lambda draw: query_padding(
        absorbed(draw, 3, 2, 6, 5, 8, query_lengths=draw.lengths(4, 6, 0))
    ),
}

RECORD = Record(
    reference=absorbed_attention,
    samples=SAMPLES,
    differentiable=("query", "key", "value", "key_bias", "key_weight"),
    autocast=("query", "key", "value"),
    typical=("weighted", "lengths-0-1-odd-over", "keys-are-values"),
    large=("frames-200-words-14", "words-13-clips-50"),
    smooth=("weighted", "lengths-0-1-odd-over"),
    valid="lengths-0-1-odd-over",
    integers=("query_lengths", "key_lengths"),
    own_dtype=("key_bias", "key_weight"),
    in_use="lengths-0-1-odd-over",
    many=many,
    fuzzed=fuzzed,
)
