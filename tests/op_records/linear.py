"""``linear``: its record."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from op_records.anything import Anything
from op_records.draw import Builder, Draw, Inputs, misaligned, strided
from op_records.record import Record


def layer(draw: Draw, *shape: int, M: int, **options: Any) -> Inputs:
    K = shape[-1]
    return {
        "x": draw.normal(*shape),
        "weight": draw.normal(M, K, scale=max(K, 1) ** -0.5),
        "bias": draw.normal(M),
    } | options


def grouped_layer(draw: Draw, *shape: int, M: int, **options: Any) -> Inputs:
    """A layer of G groups, on x [..., G, K]."""
    G, K = shape[-2:]
    return {
        "x": draw.normal(*shape),
        "weight": draw.normal(G, M, K, scale=max(K, 1) ** -0.5),
        "bias": draw.normal(G, M),
    } | options


def padded(inputs: Inputs, lengths: Tensor) -> Inputs:
    """Fills padding with NaN, since no result may depend on it."""
    x = inputs["x"].clone()
    for row, n in zip(x, lengths, strict=True):
        row[n:] = torch.nan
    return inputs | {"x": x, "lengths": lengths}


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, relu: bool = False, lengths: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Group by group, and of padded samples the real rows."""
    if lengths is not None:
        rows = []
        for row, n in zip(x, lengths.tolist(), strict=True):
            (real,) = linear(row[:n], weight, bias, relu)
            rows.append(torch.cat([real, real.new_zeros(len(row[n:]), *real.shape[1:])]))
        return (torch.stack(rows),)
    if weight.dim() == 3:
        biases = [None] * len(weight) if bias is None else list(bias)
        groups = [linear(*group, relu)[0] for group in zip(x.unbind(-2), weight, biases, strict=True)]
        if not groups:  # nothing, of the right shape and with a gradient to each
            nothing = x.sum(-1, keepdim=True) * weight.sum(-1)
            return (nothing if bias is None else nothing + bias,)
        return (torch.stack(groups, -2),)
    out = torch.einsum("...k,mk->...m", x, weight.to(x.dtype))
    if bias is not None:
        out = out + bias.to(x.dtype)
    return (out * (out > 0) if relu else out,)


def many(draw: Draw) -> Inputs:
    return {"x": draw.normal(5001, 120), "weight": draw.normal(77, 120), "bias": draw.normal(77), "relu": True}


def fuzzed(some: Anything) -> Inputs:
    groups = some.choice((), (some.H,))
    return {
        "x": some.tensor(some.B, some.L, *groups, some.d),
        "weight": some.tensor(*groups, some.V, some.d),
        "bias": some.choice(None, some.tensor(*groups, some.V)),
        "relu": some.choice(False, True),
        "lengths": some.choice(None, some.integers(some.L + 1, some.B)),
    }


SAMPLES: dict[str, Builder] = {
    "published-3x50x256": lambda draw: layer(draw, 3, 50, 256, M=256),
    "feed-forward": lambda draw: layer(draw, 2, 13, 256, M=512, relu=True),
    "frames-1024": lambda draw: layer(draw, 2, 20, 1024, M=256),
    "rows-2500": lambda draw: layer(draw, 2500, 24, M=40),
    "odd-3x5x37": lambda draw: layer(draw, 3, 5, 37, M=19, relu=True),
    "without-bias": lambda draw: layer(draw, 7, 9, M=11) | {"bias": None},
    "one-row": lambda draw: layer(draw, 8, M=3),
    "one-by-one": lambda draw: layer(draw, 1, 1, M=1, relu=True),
    "no-rows": lambda draw: layer(draw, 0, 4, 8, M=5),
    "no-inputs": lambda draw: layer(draw, 4, 0, M=5),
    "no-outputs": lambda draw: layer(draw, 4, 8, M=0),
    "float32-parameters": lambda draw: (
        layer(draw, 5, 33, M=21, relu=True)
        | {"weight": draw.normal(21, 33).to(torch.promote_types(draw.dtype, torch.float32)), "bias": None}
    ),
    "a-view-of-wider-rows": lambda draw: layer(draw, 3, 5, 8, M=7) | {"x": draw.normal(3, 5, 24)[..., 8:16]},
    "last-rows": lambda draw: layer(draw, 4, 1, 8, M=7) | {"x": draw.normal(4, 6, 8)[:, -1:]},
    "strided": lambda draw: strided(layer(draw, 3, 5, 8, M=7)),
    "misaligned": lambda draw: misaligned(layer(draw, 3, 5, 8, M=7, relu=True)),
    "a-weight-of-columns": lambda draw: layer(draw, 3, 5, 8, M=7) | {"weight": draw.normal(8, 7).mT},
    "wider-than-a-block": lambda draw: layer(draw, 70, 300, M=270, relu=True),
    "lengths-0-1-odd-over": lambda draw: padded(layer(draw, 5, 7, 37, M=19), draw.lengths(0, 1, 5, 7, 9)),
    "words-13-of-256": lambda draw: padded(layer(draw, 9, 13, 256, M=512, relu=True), draw.integers(14, 9)),
    "lengths-of-a-view": lambda draw: padded(
        layer(draw, 3, 6, 8, M=7) | {"x": draw.normal(3, 6, 24)[..., 8:16]}, draw.lengths(2, 6, 3)
    ),
    "all-padding": lambda draw: padded(layer(draw, 3, 4, 8, M=5, relu=True), draw.lengths(0, 0, 0)),
    "heads": lambda draw: grouped_layer(draw, 2, 13, 4, 64, M=256),
    "heads-of-columns": lambda draw: (
        grouped_layer(draw, 2, 50, 4, 64, M=256) | {"weight": draw.normal(4, 64, 256, scale=0.125).mT}
    ),
    "odd-groups": lambda draw: grouped_layer(draw, 5, 3, 7, M=9, relu=True),
    "odd-groups-without-bias": lambda draw: grouped_layer(draw, 4, 5, 3, 11, M=5) | {"bias": None},
    "groups-of-packed-heads": lambda draw: (
        grouped_layer(draw, 2, 5, 2, 8, M=12) | {"x": draw.normal(2, 5, 2, 2, 8)[:, :, 1]}
    ),
    "groups-lengths": lambda draw: padded(grouped_layer(draw, 3, 9, 4, 64, M=33), draw.lengths(4, 9, 0)),
    "groups-strided": lambda draw: strided(grouped_layer(draw, 3, 2, 8, M=7)),
    "one-group": lambda draw: grouped_layer(draw, 6, 1, 8, M=7),
    "no-groups": lambda draw: grouped_layer(draw, 6, 0, 8, M=7),
    "no-groups-lengths": lambda draw: padded(grouped_layer(draw, 3, 9, 0, 8, M=5), draw.lengths(4, 9, 0)),
    "groups-of-nothing": lambda draw: grouped_layer(draw, 3, 2, 0, M=5),
}

RECORD = Record(
    reference=linear,
    samples=SAMPLES,
    differentiable=("x", "weight", "bias"),
    autocast=("x",),
    typical=("odd-3x5x37", "lengths-0-1-odd-over", "odd-groups"),
    large=("rows-2500", "feed-forward", "words-13-of-256", "heads-of-columns"),
    smooth=("without-bias", "one-row", "odd-groups-without-bias"),
    valid="lengths-0-1-odd-over",
    integers=("lengths",),
    own_dtype=("weight", "bias"),
    in_use="lengths-0-1-odd-over",
    many=many,
    fuzzed=fuzzed,
)
