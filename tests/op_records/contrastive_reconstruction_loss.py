"""``contrastive_reconstruction_loss``: its record."""

from __future__ import annotations

import torch
from torch import Tensor

from op_records.anything import Anything
from op_records.draw import Builder, Inputs, misaligned, strided
from op_records.intra_video_contrastive_loss import intra_video_contrastive_loss
from op_records.linear_nll import extreme_vocabulary, ignored_targets, linear_nll, vocabulary
from op_records.linear_nll import fuzzed as any_words
from op_records.record import Record


def contrastive_reconstruction_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    valid_lengths: Tensor,
    label_smoothing: float = 0.1,
    beta_1: float = 0.1,
    beta_2: float = 0.15,
) -> tuple[Tensor, ...]:
    """Branch by branch."""
    branches = [linear_nll(h, weight, bias, target, valid_lengths, label_smoothing)[0] for h in hidden]
    return *intra_video_contrastive_loss(*branches, beta_1, beta_2), torch.stack(branches)


def fuzzed(some: Anything) -> Inputs:
    return any_words(some) | {"hidden": some.tensor(3, some.B, some.L, some.d)}


SAMPLES: dict[str, Builder] = {
    "plain": lambda draw: vocabulary(draw, 9, 5, 8, 11, branches=True),
    "published-13x256x1112": lambda draw: vocabulary(
        draw, 6, 13, 256, 1112, branches=True, lengths=(13, 6), beta_1=0.5, beta_2=0.5
    ),
    "lengths-0-1-odd-over": lambda draw: vocabulary(draw, 15, 7, 16, 33, branches=True, lengths=(0, 1, 5, 7, 9)),
    "inactive": lambda draw: vocabulary(draw, 6, 5, 37, 101, branches=True, beta_1=-9.0, beta_2=-9.0),
    "ignored-targets": lambda draw: ignored_targets(
        vocabulary(draw, 9, 5, 8, 11, branches=True, lengths=(2, 5, 0), label_smoothing=0.3)
    ),
    "one": lambda draw: vocabulary(draw, 3, 1, 1, 2, branches=True, beta_1=3.0, beta_2=3.0),
    "empty-batch": lambda draw: vocabulary(draw, 0, 5, 8, 11, branches=True),
    "extreme-logits": lambda draw: extreme_vocabulary(vocabulary(draw, 9, 5, 8, 11, branches=True)),
    "strided": lambda draw: strided(vocabulary(draw, 9, 5, 8, 11, branches=True, lengths=(2, 5, 1))),
    "misaligned": lambda draw: misaligned(vocabulary(draw, 9, 5, 8, 11, branches=True)),
}

RECORD = Record(
    reference=contrastive_reconstruction_loss,
    samples=SAMPLES,
    differentiable=("hidden", "weight", "bias"),
    autocast=("hidden", "weight"),
    typical=("plain",),
    large=("published-13x256x1112",),
    smooth=("plain", "ignored-targets"),
    valid="plain",
    integers=("target", "valid_lengths"),
    own_dtype=("weight", "bias"),
    in_use="lengths-0-1-odd-over",
    fuzzed=fuzzed,
    returns_float32=True,
    softmax_products=True,
)
