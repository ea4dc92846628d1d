"""``intra_video_contrastive_loss``: its record."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from op_records.anything import Anything
from op_records.draw import Builder, Draw, Inputs, misaligned, strided
from op_records.record import Record


def three_losses(draw: Draw, B: int, **options: Any) -> Inputs:
    return {name: draw.uniform(B, low=1, high=1.5) for name in ("positive", "hard", "easy")} | options


def intra_video_contrastive_loss(
    positive: Tensor, hard: Tensor, easy: Tensor, beta_1: float = 0.1, beta_2: float = 0.15
) -> tuple[Tensor, ...]:
    """relu(x) as (x + |x|) / 2, whose gradient at 0 is one half."""
    hinges = [positive - hard + beta_1, positive - easy + beta_2]
    return (sum(((x + x.abs()) / 2).sum() for x in hinges) / len(positive),)


def fuzzed(some: Anything) -> Inputs:
    return {name: some.tensor(some.B) for name in ("positive", "hard", "easy")}


SAMPLES: dict[str, Builder] = {
    "published-128": lambda draw: three_losses(draw, 128),
    "odd-7": lambda draw: three_losses(draw, 7, beta_1=0.3, beta_2=0.02),
    "one": lambda draw: three_losses(draw, 1, beta_1=1.0, beta_2=1.0),
    "inactive": lambda draw: three_losses(draw, 5, beta_1=-1.0, beta_2=-1.0),
    "ties": lambda draw: {
        "positive": draw.values([1.0, 1.0, 1.0, 1.0]),
        "hard": draw.values([1.125, 1.125, 2.0, 0.5]),
        "easy": draw.values([1.25, 2.0, 1.25, 1.25]),
        "beta_1": 0.125,
        "beta_2": 0.25,
    },
    "empty-batch": lambda draw: three_losses(draw, 0),
    "extreme": lambda draw: {
        "positive": draw.values([1e4, 0.0]),
        "hard": draw.values([0.0, 1e4]),
        "easy": draw.values([-1e4, 1e4]),
    },
    "strided": lambda draw: strided(three_losses(draw, 9)),
    "misaligned": lambda draw: misaligned(three_losses(draw, 9)),
}

RECORD = Record(
    reference=intra_video_contrastive_loss,
    samples=SAMPLES,
    differentiable=("positive", "hard", "easy"),
    typical=("odd-7",),
    large=("published-128",),
    smooth=("odd-7", "one"),
    valid="odd-7",
    in_use="odd-7",
    fuzzed=fuzzed,
    returns_float32=True,
)
