"""``linear_nll``: its record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from op_records.anything import Anything
from op_records.draw import Builder, Draw, Inputs, misaligned, strided
from op_records.record import Record


def vocabulary(
    draw: Draw, M: int, L: int, D: int, V: int, *, lengths: Sequence[int] | None = None, **options: Any
) -> Inputs:
    """``hidden`` [M, L, D]; an M of 3 B with ``branches`` gives [3, B, L, D] and targets of one branch."""
    branches = options.pop("branches", False)
    rows = M // 3 if branches else M
    return {
        "hidden": draw.normal(3, rows, L, D) if branches else draw.normal(M, L, D),
        "weight": draw.normal(V, D, scale=D**-0.5),
        "bias": draw.normal(V),
        "target": draw.integers(V, rows, L),
        "valid_lengths": draw.lengths(*([L] * rows if lengths is None else lengths)),
    } | options


def extreme_vocabulary(inputs: Inputs) -> Inputs:
    return inputs | {"hidden": 100 * inputs["hidden"].sign(), "weight": 12 * inputs["weight"].sign()}


def sloped(inputs: Inputs, slope: float) -> Inputs:
    """Each word's bias beyond the one before it: the largest logit comes first, or later tile by tile. The same logits
    from a large weight make large gradients of ``hidden``."""
    bias = inputs["bias"]
    bias = bias + slope * torch.arange(bias.size(0), device=bias.device).to(bias.dtype)
    return inputs | {"bias": bias, "hidden": inputs["hidden"] / 16, "weight": inputs["weight"] * 16}


def float32_parameters(inputs: Inputs) -> Inputs:
    """Parameters in float32, or wider where the rest is, of values that the rest's dtype holds."""
    wide = torch.promote_types(inputs["weight"].dtype, torch.float32)
    return inputs | {name: inputs[name].to(wide) for name in ("weight", "bias")}


def ignored_targets(inputs: Inputs) -> Inputs:
    """Targets past the valid length are no word ids at all."""
    L = inputs["target"].size(-1)
    ignored = torch.arange(L, device=inputs["target"].device) >= inputs["valid_lengths"][:, None]
    return inputs | {"target": inputs["target"].masked_fill(ignored, -100)}


def linear_nll(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    valid_lengths: Tensor,
    label_smoothing: float = 0.1,
    return_accuracy: bool = False,
) -> tuple[Tensor, ...]:
    """Row by row through ``F.cross_entropy``, whose smoothing spreads over the whole vocabulary too."""
    nll, accuracy = [], []
    for row, labels, length in zip(hidden, target, valid_lengths.tolist(), strict=True):
        logits = F.linear(row[:length], weight, bias)
        labels = labels[:length]
        tokens = max(len(labels), 1)
        nll.append(F.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="sum") / tokens)
        accuracy.append((logits.argmax(-1) == labels).sum().to(hidden.dtype) / tokens)
    if not nll:  # no rows: an empty result that still depends on everything
        nll = accuracy = [hidden.sum() * weight.sum() * bias.sum()]
        return (torch.stack(nll)[:0],) * (2 if return_accuracy else 1)
    return (torch.stack(nll), torch.stack(accuracy)) if return_accuracy else (torch.stack(nll),)


def many(draw: Draw) -> Inputs:
    layer = {"weight": draw.normal(1003, 37), "bias": draw.normal(1003)}
    words = {"target": draw.integers(1003, 61, 17), "valid_lengths": draw.integers(18, 61)}
    return {"hidden": draw.normal(61, 17, 37), **layer, **words}


def fuzzed(some: Anything) -> Inputs:
    return {
        "hidden": some.tensor(some.B, some.L, some.d),
        "weight": some.tensor(some.V, some.d),
        "bias": some.tensor(some.V),
        "target": some.integers(some.V, some.B, some.L),
        "valid_lengths": some.integers(some.L + 1, some.B),
        "label_smoothing": some.number(0.1),
    }


SAMPLES: dict[str, Builder] = {
    "plain": lambda draw: vocabulary(draw, 3, 5, 8, 11),
    "published-13x256x1112": lambda draw: vocabulary(draw, 4, 13, 256, 1112, lengths=(13, 4, 8, 11)),
    "lengths-0-1-odd-over": lambda draw: vocabulary(draw, 5, 7, 16, 33, lengths=(0, 1, 5, 7, 9)),
    "odd": lambda draw: vocabulary(draw, 3, 5, 37, 101, lengths=(5, 3, 1), return_accuracy=True),
    "ignored-targets": lambda draw: ignored_targets(vocabulary(draw, 3, 5, 8, 11, lengths=(2, 5, 0))),
    "no-smoothing": lambda draw: vocabulary(draw, 3, 5, 8, 11, label_smoothing=0.0),
    "all-smoothing": lambda draw: vocabulary(draw, 3, 5, 8, 11, label_smoothing=1.0),
    "one-word": lambda draw: vocabulary(draw, 2, 3, 8, 1),
    "one-token": lambda draw: vocabulary(draw, 1, 1, 1, 2),
    "no-rows": lambda draw: vocabulary(draw, 0, 5, 8, 11),
    "no-tokens": lambda draw: vocabulary(draw, 3, 0, 8, 11),
    "extreme-logits": lambda draw: extreme_vocabulary(vocabulary(draw, 3, 5, 8, 11)),
    "rising-logits": lambda draw: sloped(vocabulary(draw, 2, 5, 256, 330), 0.0625),
    "falling-logits": lambda draw: sloped(vocabulary(draw, 2, 5, 256, 330), -0.0625),
    "strided": lambda draw: strided(vocabulary(draw, 3, 5, 8, 11, lengths=(2, 5, 1))),
    "misaligned": lambda draw: misaligned(vocabulary(draw, 3, 5, 8, 11)),
    "float32-parameters": lambda draw: float32_parameters(vocabulary(draw, 3, 5, 21, 150)),
}

RECORD = Record(
    reference=linear_nll,
    samples=SAMPLES,
    differentiable=("hidden", "weight", "bias"),
    autocast=("hidden", "weight"),
    typical=("odd", "lengths-0-1-odd-over"),
    large=("published-13x256x1112",),
    smooth=("plain", "lengths-0-1-odd-over", "ignored-targets"),
    valid="odd",
    integers=("target", "valid_lengths"),
    own_dtype=("weight", "bias"),
    in_use="lengths-0-1-odd-over",
    many=many,
    fuzzed=fuzzed,
    returns_float32=True,
    softmax_products=True,
)
