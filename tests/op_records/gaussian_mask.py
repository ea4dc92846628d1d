"""``gaussian_mask``: its record."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from op_records.anything import Anything
from op_records.draw import Builder, Draw, Inputs, misaligned, strided
from op_records.record import Record


def gaussian_mask(
    center: Tensor,
    width: Tensor,
    length: int,
    alpha: float | None = None,
    min_width: float | None = None,
    complement: bool = False,
    sigma: float | None = None,
) -> tuple[Tensor, ...]:
    """Point by point."""
    if sigma is not None:
        return (by_deviation(center, width, length, sigma, 0.01 if min_width is None else min_width, complement),)
    assert alpha is not None
    min_width = 0.1 if min_width is None else min_width
    clamped = torch.where(width < min_width, torch.full_like(width, min_width), width)
    points = []
    for j in range(length):
        x = j / (length - 1) if length > 1 else 0.0
        g = torch.exp(-alpha * ((x - center) / clamped) ** 2)
        points.append(1 - g if complement else g)
    return (torch.stack(points, -1) if points else center.new_zeros(*center.shape, 0),)


def by_deviation(
    center: Tensor, width: Tensor, length: int, sigma: float, min_width: float, complement: bool
) -> Tensor:
    """Each point over the one nearest to the center, by the logarithm of the quotient."""
    x = torch.arange(length, dtype=center.dtype, device=center.device) / max(length - 1, 1)
    clamped = torch.where(width < min_width, torch.full_like(width, min_width), width)
    c, deviation = center.unsqueeze(-1), clamped.unsqueeze(-1) / sigma
    if length == 0:
        return center.new_zeros(*center.shape, 0)
    peak = x[(x - c).abs().argmin(-1, keepdim=True)]
    g = torch.exp((peak - x) * (peak + x - 2 * c) / (2 * deviation**2))
    return 1 - g if complement else g


def mask(draw: Draw, shape: tuple[int, ...], length: int, *, alpha: float = 5.5, **options: Any) -> Inputs:
    moment = {"center": draw.uniform(*shape), "width": draw.uniform(*shape, low=0.15)}
    return moment | {"length": length, "alpha": alpha} | options


def narrow(draw: Draw, inputs: Inputs) -> Inputs:
    """Widths below, at and above the clamp (0.125 is exact in every dtype), centers in and outside the video."""
    moment = {"center": draw.values([0.5, -0.25, 1.0, 1.5, 0.0]), "width": draw.values([0.0, 0.125, 0.0625, -1.0, 1.0])}
    return inputs | moment | {"min_width": 0.125}


def normalized(draw: Draw, shape: tuple[int, ...], length: int, **options: Any) -> Inputs:
    """CPL's form; no center is as near to one point as to another."""
    inputs = mask(draw, shape, length) | {"sigma": 9.0} | options
    del inputs["alpha"]
    place = (inputs["center"] * (length - 1)).float()
    inputs["center"] = draw.cast((place.floor() + place.frac() * 0.4) / max(length - 1, 1))
    return inputs


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
    "normalized-50": lambda draw: normalized(draw, (4, 8), 50),
    "normalized-odd-37-complement": lambda draw: normalized(draw, (3, 5), 37, complement=True),
    "normalized-length-0": lambda draw: normalized(draw, (3,), 0),
    "normalized-length-1": lambda draw: normalized(draw, (3,), 1),
    "normalized-length-300": lambda draw: normalized(draw, (2,), 300, sigma=4.5),
    "normalized-empty-batch": lambda draw: normalized(draw, (0,), 8),
    "normalized-narrow-and-outside": lambda draw: narrow(draw, normalized(draw, (5,), 21)),
    "normalized-strided": lambda draw: strided(normalized(draw, (3, 5), 9)),
    "strided": lambda draw: strided(mask(draw, (3, 5), 9)),
    "misaligned": lambda draw: misaligned(mask(draw, (7,), 33)),
}

RECORD = Record(
    reference=gaussian_mask,
    samples=SAMPLES,
    differentiable=("center", "width"),
    typical=("odd-3x5x37-complement", "normalized-odd-37-complement"),
    large=("published-50", "normalized-50"),
    smooth=("odd-3x5x37-complement", "length-1", "scalar", "normalized-odd-37-complement"),
    valid="odd-3x5x37-complement",
    in_use="published-50",
    many=many,
    fuzzed=fuzzed,
    ill_conditioned=True,
)
