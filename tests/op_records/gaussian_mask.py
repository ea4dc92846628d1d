"""``gaussian_mask``: its record."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from op_records.anything import Anything
from op_records.draw import Builder, Draw, Inputs, misaligned, strided
from op_records.record import Record


def gaussian_mask(
    center: Tensor, width: Tensor, length: int, alpha: float, min_width: float = 0.1, complement: bool = False
) -> tuple[Tensor, ...]:
    """Point by point."""
    clamped = torch.where(width < min_width, torch.full_like(width, min_width), width)
    points = []
    for j in range(length):
        x = j / (length - 1) if length > 1 else 0.0
        g = torch.exp(-alpha * ((x - center) / clamped) ** 2)
        points.append(1 - g if complement else g)
    return (torch.stack(points, -1) if points else center.new_zeros(*center.shape, 0),)


def mask(draw: Draw, shape: tuple[int, ...], length: int, *, alpha: float = 5.5, **options: Any) -> Inputs:
    moment = {"center": draw.uniform(*shape), "width": draw.uniform(*shape, low=0.15)}
    return moment | {"length": length, "alpha": alpha} | options


def narrow(draw: Draw, inputs: Inputs) -> Inputs:
    """Widths below, at and above the clamp (0.125 is exact in every dtype), centers in and outside the video."""
    moment = {"center": draw.values([0.5, -0.25, 1.0, 1.5, 0.0]), "width": draw.values([0.0, 0.125, 0.0625, -1.0, 1.0])}
    return inputs | moment | {"min_width": 0.125}


def many(draw: Draw) -> Inputs:
    return {"center": draw.uniform(3001), "width": draw.uniform(3001), "length": 200, "alpha": 5.0}


def any_moment(some: Anything) -> Inputs:
    return {"center": some.tensor(some.B), "width": some.tensor(some.B), "alpha": some.number(5.0)}


def fuzzed(some: Anything) -> Inputs:
    return any_moment(some) | {"length": some.choice(0, 1, 7, -1, 2.5)}


SAMPLES: dict[str, Builder] = {
    "published-50": lambda draw: mask(draw, (4,), 50),
    "odd-3x5x37-complement": lambda draw: mask(draw, (3, 5), 37, complement=True),
    "scalar": lambda draw: mask(draw, (), 7),
    "empty-batch": lambda draw: mask(draw, (0,), 8),
    "length-0": lambda draw: mask(draw, (3,), 0),
    "length-1": lambda draw: mask(draw, (3,), 1),
    "length-200-alpha-0": lambda draw: mask(draw, (2,), 200, alpha=0.0),
    "narrow-and-outside": lambda draw: narrow(draw, mask(draw, (5,), 21)),
    "narrow-and-outside-complement": lambda draw: narrow(draw, mask(draw, (5,), 21, complement=True)),
    "strided": lambda draw: strided(mask(draw, (3, 5), 9)),
    "misaligned": lambda draw: misaligned(mask(draw, (7,), 33)),
}

RECORD = Record(
    reference=gaussian_mask,
    samples=SAMPLES,
    differentiable=("center", "width"),
    typical=("odd-3x5x37-complement",),
    large=("published-50",),
    smooth=("odd-3x5x37-complement", "length-1", "scalar"),
    valid="odd-3x5x37-complement",
    in_use="published-50",
    many=many,
    fuzzed=fuzzed,
    ill_conditioned=True,
)
