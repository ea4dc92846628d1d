"""``dropout_add_layer_norm``: its record."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from op_records.anything import Anything
from op_records.draw import Builder, Draw, Inputs, misaligned, strided
from op_records.dropout import any_dropout, dropout
from op_records.record import Record


def add_and_norm(draw: Draw, *shape: int, p: float = 0.1, **options: Any) -> Inputs:
    D = shape[-1]
    return {
        "x": draw.normal(*shape),
        "residual": draw.normal(*shape),
        "weight": draw.uniform(D, low=0.5, high=1.5),
        "bias": draw.normal(D),
        "p": p,
        "seed": 1234,
    } | options


def chosen(draw: Draw, inputs: Inputs, samples: tuple[int, ...] = (6, 0, 3, 6)) -> Inputs:
    """Samples of a larger batch, in any order and more than once."""
    return inputs | {"sample_indices": draw.lengths(*samples)}


def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    p: float,
    seed: int | Tensor,
    offset: int = 0,
    eps: float = 1e-5,
    sample_indices: Tensor | None = None,
    twice: bool = False,
) -> tuple[Tensor, ...]:
    """Mean and variance spelt out; of a larger batch the samples asked for."""
    if sample_indices is None or len(sample_indices) == 0:
        total = residual + dropout(x, p, seed, offset)[0]
    else:
        scale = torch.ones(int(sample_indices.max()) + 1, *x.shape[1:], dtype=x.dtype, device=x.device)
        total = residual + x * dropout(scale, p, seed, offset)[0][sample_indices]
    centered = total - total.mean(-1, keepdim=True)
    deviation = (centered.square().mean(-1, keepdim=True) + eps).sqrt()
    out = centered / deviation * weight.to(x.dtype) + bias.to(x.dtype)
    return (out, out) if twice else (out,)


def many(draw: Draw) -> Inputs:
    return add_and_norm(draw, 9001, 251, p=0.1, seed=3)


def fuzzed(some: Anything) -> Inputs:
    rows = {name: some.tensor(some.B, some.d) for name in ("x", "residual")}
    return rows | {name: some.tensor(some.d) for name in ("weight", "bias")} | any_dropout(some)


SAMPLES: dict[str, Builder] = {
    "published-12x256": lambda draw: add_and_norm(draw, 3, 4, 256),
    "odd-5x37": lambda draw: add_and_norm(draw, 5, 37, p=0.5, offset=2**40 + 1, eps=1e-3),
    "no-dropout": lambda draw: add_and_norm(draw, 2, 3, 40, p=0.0),
    "all-dropped": lambda draw: add_and_norm(draw, 2, 3, 40, p=1.0),
    "one-row-of-17": lambda draw: add_and_norm(draw, 17),
    "one-column": lambda draw: add_and_norm(draw, 4, 1, eps=1e-2),
    "no-rows": lambda draw: add_and_norm(draw, 0, 8),
    "thousand-columns": lambda draw: add_and_norm(draw, 3, 1000),
    "constant-rows": lambda draw: (
        add_and_norm(draw, 3, 16, p=0.0)
        | {"x": draw.normal(3, 1).expand(3, 16).contiguous(), "residual": draw.cast(torch.zeros(3, 16))}
    ),
    "large": lambda draw: add_and_norm(draw, 3, 24) | {"residual": draw.normal(3, 24, scale=1e4)},
    "float32-parameters": lambda draw: (
        add_and_norm(draw, 3, 24)
        | {name: draw.normal(24).to(torch.promote_types(draw.dtype, torch.float32)) for name in ("weight", "bias")}
    ),
    "strided": lambda draw: strided(add_and_norm(draw, 3, 5, 12)),
    "misaligned": lambda draw: misaligned(add_and_norm(draw, 3, 5, 13)),
    "chosen-samples": lambda draw: chosen(draw, add_and_norm(draw, 4, 3, 24, p=0.4)),
    "chosen-odd": lambda draw: chosen(draw, add_and_norm(draw, 4, 2, 3, 37, p=0.4)),
    "chosen-without-dropout": lambda draw: chosen(draw, add_and_norm(draw, 4, 5, p=0.0)),
    "twice": lambda draw: add_and_norm(draw, 3, 4, 256, twice=True),
    "twice-odd": lambda draw: add_and_norm(draw, 5, 37, p=0.5, eps=1e-3, twice=True),
    "twice-misaligned": lambda draw: misaligned(add_and_norm(draw, 3, 5, 13, p=0.0, twice=True)),
    "twice-chosen": lambda draw: chosen(draw, add_and_norm(draw, 4, 3, 24, p=0.4, twice=True)),
    "twice-no-rows": lambda draw: add_and_norm(draw, 0, 8, twice=True),
    "chosen-none": lambda draw: chosen(draw, add_and_norm(draw, 0, 2, 8), ()),
}

RECORD = Record(
    reference=dropout_add_layer_norm,
    samples=SAMPLES,
    differentiable=("x", "residual", "weight", "bias"),
    typical=("odd-5x37", "chosen-samples", "twice-odd"),
    large=("thousand-columns",),
    smooth=("odd-5x37", "no-dropout"),
    valid="odd-5x37",
    own_dtype=("weight", "bias"),
    in_use="published-12x256",
    many=many,
    fuzzed=fuzzed,
)
