"""``gaussian_attention``: its record."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from op_records.anything import Anything
from op_records.draw import Builder, Draw, Inputs
from op_records.gaussian_mask import any_moment, gaussian_mask, narrow
from op_records.record import Record
from op_records.weighted_attention import ATTENTION_SHAPES, any_attention, attention, many_heads, weighted_attention


def gaussian(draw: Draw, B: int, H: int, Lq: int, Lk: int, d: int, *, alpha: float = 5.5, **options: Any) -> Inputs:
    moment = {"center": draw.uniform(B), "width": draw.uniform(B, low=0.15), "alpha": alpha}
    return attention(draw, B, H, Lq, Lk, d, **options) | moment


def gaussian_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    center: Tensor,
    width: Tensor,
    alpha: float,
    min_width: float = 0.1,
    complement: bool = False,
    causal: bool = False,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    """``weighted_attention`` with the mask in memory."""
    (mask,) = gaussian_mask(center.to(query.dtype), width.to(query.dtype), key.size(2), alpha, min_width, complement)
    return weighted_attention(query, key, value, mask, causal, key_lengths, scale)


def many(draw: Draw) -> Inputs:
    heads = many_heads(draw)
    moment = {"center": draw.uniform(7), "width": draw.uniform(7), "alpha": 5.0}
    return heads | moment | {"causal": True, "key_lengths": draw.lengths(0, 1, 16, 50, 99, 101, 64)}


def fuzzed(some: Anything) -> Inputs:
    return any_attention(some) | any_moment(some)


SAMPLES: dict[str, Builder] = {
    **{name: make(gaussian) for name, make in ATTENTION_SHAPES.items()},
    "complement": lambda draw: gaussian(draw, 3, 2, 5, 11, 8, complement=True, causal=True),
    "complement-words-clips": lambda draw: gaussian(draw, 2, 4, 13, 50, 64, complement=True),
    "narrow-and-outside": lambda draw: narrow(draw, gaussian(draw, 5, 2, 4, 21, 8)),
    "narrow-and-outside-complement": lambda draw: narrow(draw, gaussian(draw, 5, 2, 4, 21, 8, complement=True)),
}

RECORD = Record(
    reference=gaussian_attention,
    samples=SAMPLES,
    differentiable=("query", "key", "value", "center", "width"),
    autocast=("query", "key", "value"),
    typical=("causal-lengths", "complement"),
    large=("frames-200", "complement-words-clips"),
    smooth=("causal-more-queries", "complement", "lengths-0-1-odd-over"),
    valid="causal-lengths",
    integers=("key_lengths",),
    own_dtype=("center", "width"),
    in_use="clips-50",
    many=many,
    fuzzed=fuzzed,
    ill_conditioned=True,
)
