"""Sample inputs of every op: the one factory behind the tests of values, gradients, determinism and dispatch.

A sample is the keyword arguments of one call of the public function. Values are drawn in float64 from a seed that the
sample's name fixes and rounded to the dtype under test, so every backend sees the same numbers.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import pytest
import torch
from op_records import RECORDS
from torch import Tensor

import cnm_kernels
from cnm_kernels import registry

Inputs = dict[str, Any]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DIFFERENTIABLE = {op: record.differentiable for op, record in RECORDS.items()}


class Draw:
    """Seeded random tensors of one dtype on one device."""

    def __init__(self, seed: str, dtype: torch.dtype, device: str) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return self.cast(scale * torch.randn(shape, generator=self.generator, dtype=torch.float64))

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return self.cast(low + (high - low) * torch.rand(shape, generator=self.generator, dtype=torch.float64))

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator).to(self.device)

    def values(self, values: Sequence[float]) -> Tensor:
        return self.cast(torch.tensor(values, dtype=torch.float64))

    def lengths(self, *lengths: int) -> Tensor:
        return torch.tensor(lengths, dtype=torch.int64, device=self.device)

    def cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype).to(self.device)


Builder = Callable[[Draw], Inputs]


def attention(draw: Draw, B: int, H: int, Lq: int, Lk: int, d: int, **options: Any) -> Inputs:
    shapes = {"query": (B, H, Lq, d), "key": (B, H, Lk, d), "value": (B, H, Lk, d)}
    return {name: draw.normal(*shape) for name, shape in shapes.items()} | options


def weighted(draw: Draw, B: int, H: int, Lq: int, Lk: int, d: int, **options: Any) -> Inputs:
    return attention(draw, B, H, Lq, Lk, d, **options) | {"key_weight": draw.uniform(B, Lk)}


def scored(draw: Draw, *sizes: int, **options: Any) -> Inputs:
    """Queries and keys alone."""
    return {name: value for name, value in attention(draw, *sizes, **options).items() if name != "value"}


def weighted_scored(draw: Draw, *sizes: int, **options: Any) -> Inputs:
    return {name: value for name, value in weighted(draw, *sizes, **options).items() if name != "value"}


def gaussian(draw: Draw, B: int, H: int, Lq: int, Lk: int, d: int, *, alpha: float = 5.5, **options: Any) -> Inputs:
    moment = {"center": draw.uniform(B), "width": draw.uniform(B, low=0.15), "alpha": alpha}
    return attention(draw, B, H, Lq, Lk, d, **options) | moment


def branched(draw: Draw, n: int, B: int, H: int, Lq: int, Lk: int, d: int, **options: Any) -> Inputs:
    return attention(draw, B, H, Lq, Lk, d, **options) | {"key_weights": draw.uniform(n, B, Lk)}


def absorbed(draw: Draw, B: int, H: int, Lq: int, Lk: int, D: int, **options: Any) -> Inputs:
    """With a bias and without a weight, as many queries meet few keys."""
    return {
        "query": draw.normal(B, Lq, D),
        "key": draw.normal(B, H, Lk, D),
        "value": draw.normal(B, H, Lk, D),
        "key_bias": draw.normal(B, H, Lk),
        "scale": D**-0.5,
    } | options


def absorbed_queries(draw: Draw, B: int, Lq: int, Lk: int, D: int, **options: Any) -> Inputs:
    """With a weight, and keys that are the values, as few queries meet many states."""
    return {
        "query": draw.normal(B, Lq, D),
        "key": draw.normal(B, 1, Lk, D),
        "key_weight": draw.uniform(B, Lk),
        "scale": D**-0.5,
    } | options


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


def layer(draw: Draw, *shape: int, M: int, **options: Any) -> Inputs:
    K = shape[-1]
    return {
        "x": draw.normal(*shape),
        "weight": draw.normal(M, K, scale=max(K, 1) ** -0.5),
        "bias": draw.normal(M),
    } | options


def grouped_layer(draw: Draw, *shape: int, M: int, **options: Any) -> Inputs:
    """Of x [..., G, K]."""
    G, K = shape[-2:]
    return {
        "x": draw.normal(*shape),
        "weight": draw.normal(G, M, K, scale=max(K, 1) ** -0.5),
        "bias": draw.normal(G, M),
    } | options


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


def three_losses(draw: Draw, B: int, **options: Any) -> Inputs:
    return {name: draw.uniform(B, low=1, high=1.5) for name in ("positive", "hard", "easy")} | options


def _padded(inputs: Inputs, lengths: Tensor) -> Inputs:
    """What lies in padding is NaN, if nothing may depend on it."""
    x = inputs["x"].clone()
    for row, n in zip(x, lengths, strict=True):
        row[n:] = torch.nan
    return inputs | {"x": x, "lengths": lengths}


def _query_padding(inputs: Inputs) -> Inputs:
    padded = _padded({"x": inputs["query"]}, inputs["query_lengths"])
    return inputs | {"query": padded["x"]}


def strided(inputs: Inputs) -> Inputs:
    """Every floating tensor as every other element of a larger one that holds NaN elsewhere."""

    def spread(tensor: Tensor) -> Tensor:
        wide = torch.full((*tensor.shape[:-1], 2 * tensor.size(-1)), torch.nan, dtype=tensor.dtype).to(tensor.device)
        wide[..., ::2] = tensor
        return wide[..., ::2]

    return _map_floating(spread, inputs)


def misaligned(inputs: Inputs) -> Inputs:
    """Every floating tensor contiguous, but one element past an aligned address, between NaNs."""

    def shift(tensor: Tensor) -> Tensor:
        flat = torch.full((tensor.numel() + 2,), torch.nan, dtype=tensor.dtype, device=tensor.device)
        flat[1:-1] = tensor.reshape(-1)
        return flat[1:-1].view(tensor.shape)

    return _map_floating(shift, inputs)


def heads_last(inputs: Inputs) -> Inputs:
    """query, key, value as a model hands them over: [B, L, H, d] in memory, transposed."""
    names = [name for name in ("query", "key", "value") if name in inputs]
    return inputs | {name: inputs[name].transpose(1, 2).contiguous().transpose(1, 2) for name in names}


def _map_floating(function: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    def is_floating(value: Any) -> bool:
        return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0

    return {name: function(value) if is_floating(value) else value for name, value in inputs.items()}


def _zero_rows(inputs: Inputs) -> Inputs:
    key_weight = inputs["key_weight"].clone()
    key_weight[0] = 0
    key_weight[1, ::2] = 0
    return inputs | {"key_weight": key_weight}


def _weightless_keys_ahead(inputs: Inputs) -> Inputs:
    """Keys of weight 0 lead by 23 = -log(1e-10), so that the 1e-10 added to every weight decides."""
    key, key_weight = torch.zeros_like(inputs["key"]), torch.ones_like(inputs["key_weight"])
    key[:, :, ::2] = 1
    key_weight[:, ::2] = 0
    return inputs | {"query": torch.ones_like(inputs["query"]), "key": key, "key_weight": key_weight, "scale": 23 / 8}


def _extreme_logits(inputs: Inputs) -> Inputs:
    """Scores of +-1e4, from entries that float16 holds."""
    query, key = torch.full_like(inputs["query"], 50.0), torch.full_like(inputs["key"], 50.0)
    key[:, :, ::2] *= -1
    key[:, :, -1] *= 0.5
    return inputs | {"query": query, "key": key, "scale": 1e4 / (2500 * query.size(-1))}


def _narrow(draw: Draw, inputs: Inputs) -> Inputs:
    """Widths below, at and above the clamp (0.125 is exact in every dtype), centers in and outside the video."""
    moment = {"center": draw.values([0.5, -0.25, 1.0, 1.5, 0.0]), "width": draw.values([0.0, 0.125, 0.0625, -1.0, 1.0])}
    return inputs | moment | {"min_width": 0.125}


def _extreme_vocabulary(inputs: Inputs) -> Inputs:
    return inputs | {"hidden": 100 * inputs["hidden"].sign(), "weight": 12 * inputs["weight"].sign()}


def _float32_parameters(inputs: Inputs) -> Inputs:
    """Parameters in float32, or wider where the rest is, of values that the rest's dtype holds."""
    wide = torch.promote_types(inputs["weight"].dtype, torch.float32)
    return inputs | {name: inputs[name].to(wide) for name in ("weight", "bias")}


def _ignored_targets(inputs: Inputs) -> Inputs:
    """Targets past the valid length are no word ids at all."""
    L = inputs["target"].size(-1)
    ignored = torch.arange(L, device=inputs["target"].device) >= inputs["valid_lengths"][:, None]
    return inputs | {"target": inputs["target"].masked_fill(ignored, -100)}


ATTENTION_SHAPES: dict[str, Callable[[Callable[..., Inputs]], Builder]] = {
    "plain": lambda make: lambda draw: make(draw, 2, 2, 5, 7, 8),
    "causal": lambda make: lambda draw: make(draw, 2, 4, 13, 13, 16, causal=True),
    "causal-more-keys": lambda make: lambda draw: make(draw, 1, 2, 4, 9, 8, causal=True),
    "causal-more-queries": lambda make: lambda draw: make(draw, 1, 2, 9, 4, 8, causal=True),
    "lengths-0-1-odd-over": lambda make: (
        lambda draw: make(draw, 5, 2, 6, 7, 8, key_lengths=draw.lengths(0, 1, 5, 7, 9))
    ),
    "causal-lengths": lambda make: (
        lambda draw: make(draw, 3, 2, 17, 17, 33, causal=True, key_lengths=draw.lengths(17, 1, 6))
    ),
    "three-heads": lambda make: lambda draw: make(draw, 2, 3, 5, 6, 7),
    "scale": lambda make: lambda draw: make(draw, 2, 2, 5, 7, 8, scale=0.3),
    "all-ones": lambda make: lambda draw: make(draw, 1, 1, 1, 1, 1),
    "one-key": lambda make: lambda draw: make(draw, 2, 2, 3, 1, 8),
    "empty-batch": lambda make: lambda draw: make(draw, 0, 2, 3, 4, 8),
    "no-queries": lambda make: lambda draw: make(draw, 2, 2, 0, 4, 8),
    "no-keys": lambda make: lambda draw: make(draw, 2, 2, 3, 0, 8),
    "frames-200": lambda make: lambda draw: make(draw, 1, 4, 200, 200, 64, causal=True, key_lengths=draw.lengths(171)),
    "clips-50": lambda make: lambda draw: make(draw, 2, 4, 50, 50, 64, causal=True),
    "words-20-clips-50": lambda make: lambda draw: make(draw, 2, 4, 20, 50, 64, key_lengths=draw.lengths(50, 23)),
    "strided": lambda make: lambda draw: strided(make(draw, 2, 2, 5, 7, 8)),
    "misaligned": lambda make: lambda draw: misaligned(make(draw, 2, 2, 5, 7, 8, causal=True)),
    "heads-last": lambda make: lambda draw: heads_last(make(draw, 2, 2, 5, 7, 8)),
    "extreme-logits": lambda make: lambda draw: _extreme_logits(make(draw, 2, 2, 5, 7, 8)),
}

SAMPLES: dict[str, dict[str, Builder]] = {
    "gaussian_mask": {
        "published-50": lambda draw: _mask(draw, (4,), 50),
        "odd-3x5x37-complement": lambda draw: _mask(draw, (3, 5), 37, complement=True),
        "scalar": lambda draw: _mask(draw, (), 7),
        "empty-batch": lambda draw: _mask(draw, (0,), 8),
        "length-0": lambda draw: _mask(draw, (3,), 0),
        "length-1": lambda draw: _mask(draw, (3,), 1),
        "length-200-alpha-0": lambda draw: _mask(draw, (2,), 200, alpha=0.0),
        "narrow-and-outside": lambda draw: _narrow(draw, _mask(draw, (5,), 21)),
        "narrow-and-outside-complement": lambda draw: _narrow(draw, _mask(draw, (5,), 21, complement=True)),
        "strided": lambda draw: strided(_mask(draw, (3, 5), 9)),
        "misaligned": lambda draw: misaligned(_mask(draw, (7,), 33)),
    },
    "weighted_attention": {
        **{f"unweighted-{name}": make(attention) for name, make in ATTENTION_SHAPES.items()},
        **{f"weighted-{name}": make(weighted) for name, make in ATTENTION_SHAPES.items()},
        "zero-weights": lambda draw: _zero_rows(weighted(draw, 2, 2, 5, 7, 8)),
        "weightless-keys-ahead": lambda draw: _weightless_keys_ahead(weighted(draw, 2, 2, 5, 7, 8)),
        "zero-weights-extreme-logits": lambda draw: _zero_rows(_extreme_logits(weighted(draw, 2, 2, 5, 7, 8))),
        "weights-in-float32": lambda draw: (
            attention(draw, 2, 2, 5, 7, 8)
            | {"key_weight": draw.uniform(2, 7).to(torch.promote_types(draw.dtype, torch.float32))}
            if draw.dtype != torch.float64
            else weighted(draw, 2, 2, 5, 7, 8)
        ),
    },
    "gaussian_attention": {
        **{name: make(gaussian) for name, make in ATTENTION_SHAPES.items()},
        "complement": lambda draw: gaussian(draw, 3, 2, 5, 11, 8, complement=True, causal=True),
        "complement-words-clips": lambda draw: gaussian(draw, 2, 4, 13, 50, 64, complement=True),
        "narrow-and-outside": lambda draw: _narrow(draw, gaussian(draw, 5, 2, 4, 21, 8)),
        "narrow-and-outside-complement": lambda draw: _narrow(draw, gaussian(draw, 5, 2, 4, 21, 8, complement=True)),
    },
    "attention_weights": {
        **{f"unweighted-{name}": make(scored) for name, make in ATTENTION_SHAPES.items()},
        **{f"weighted-{name}": make(weighted_scored) for name, make in ATTENTION_SHAPES.items()},
        "zero-weights": lambda draw: _zero_rows(weighted_scored(draw, 2, 2, 5, 7, 8)),
    },
    "branched_attention": {
        "plain": lambda draw: branched(draw, 3, 2, 2, 5, 7, 8),
        "one-branch": lambda draw: branched(draw, 1, 2, 2, 5, 7, 8),
        "clips-50": lambda draw: branched(draw, 3, 2, 4, 50, 50, 64, causal=True),
        "frames-150": lambda draw: branched(draw, 2, 1, 2, 150, 150, 64, causal=True),
        "lengths-0-1-odd-over": lambda draw: branched(draw, 2, 5, 2, 6, 7, 8, key_lengths=draw.lengths(0, 1, 5, 7, 9)),
        "empty-batch": lambda draw: branched(draw, 3, 0, 2, 3, 4, 8),
        "no-keys": lambda draw: branched(draw, 3, 2, 2, 3, 0, 8),
        "strided": lambda draw: strided(branched(draw, 3, 2, 2, 5, 7, 8)),
        "misaligned": lambda draw: misaligned(branched(draw, 3, 2, 2, 5, 7, 8, causal=True)),
        "extreme-logits": lambda draw: _extreme_logits(branched(draw, 3, 2, 2, 5, 7, 8)),
    },
    "absorbed_attention": {
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
        "zero-weights": lambda draw: _zero_rows(absorbed_queries(draw, 2, 5, 7, 8)),
        "extreme-scores": lambda draw: absorbed(draw, 2, 2, 5, 7, 8, scale=1e4),
        "strided": lambda draw: strided(absorbed(draw, 2, 2, 5, 7, 8)),
        "misaligned": lambda draw: misaligned(absorbed(draw, 2, 2, 5, 7, 8)),
        "heads-last": lambda draw: (
            absorbed(draw, 2, 2, 5, 7, 8) | {name: draw.normal(2, 7, 2, 8).transpose(1, 2) for name in ("key", "value")}
        ),
        "anything-in-padding": lambda draw: _query_padding(
            absorbed(draw, 3, 2, 6, 5, 8, query_lengths=draw.lengths(4, 6, 0))
        ),
    },
    "linear": {
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
        "lengths-0-1-odd-over": lambda draw: _padded(layer(draw, 5, 7, 37, M=19), draw.lengths(0, 1, 5, 7, 9)),
        "words-13-of-256": lambda draw: _padded(layer(draw, 9, 13, 256, M=512, relu=True), draw.integers(14, 9)),
        "lengths-of-a-view": lambda draw: _padded(
            layer(draw, 3, 6, 8, M=7) | {"x": draw.normal(3, 6, 24)[..., 8:16]}, draw.lengths(2, 6, 3)
        ),
        "all-padding": lambda draw: _padded(layer(draw, 3, 4, 8, M=5, relu=True), draw.lengths(0, 0, 0)),
        "heads": lambda draw: grouped_layer(draw, 2, 13, 4, 64, M=256),
        "heads-of-columns": lambda draw: (
            grouped_layer(draw, 2, 50, 4, 64, M=256) | {"weight": draw.normal(4, 64, 256, scale=0.125).mT}
        ),
        "odd-groups": lambda draw: grouped_layer(draw, 5, 3, 7, M=9, relu=True),
        "odd-groups-without-bias": lambda draw: grouped_layer(draw, 4, 5, 3, 11, M=5) | {"bias": None},
        "groups-of-packed-heads": lambda draw: (
            grouped_layer(draw, 2, 5, 2, 8, M=12) | {"x": draw.normal(2, 5, 2, 2, 8)[:, :, 1]}
        ),
        "groups-lengths": lambda draw: _padded(grouped_layer(draw, 3, 9, 4, 64, M=33), draw.lengths(4, 9, 0)),
        "groups-strided": lambda draw: strided(grouped_layer(draw, 3, 2, 8, M=7)),
        "one-group": lambda draw: grouped_layer(draw, 6, 1, 8, M=7),
        "no-groups": lambda draw: grouped_layer(draw, 6, 0, 8, M=7),
        "no-groups-lengths": lambda draw: _padded(grouped_layer(draw, 3, 9, 0, 8, M=5), draw.lengths(4, 9, 0)),
        "groups-of-nothing": lambda draw: grouped_layer(draw, 3, 2, 0, M=5),
    },
    "linear_nll": {
        "plain": lambda draw: vocabulary(draw, 3, 5, 8, 11),
        "published-13x256x1112": lambda draw: vocabulary(draw, 4, 13, 256, 1112, lengths=(13, 4, 8, 11)),
        "lengths-0-1-odd-over": lambda draw: vocabulary(draw, 5, 7, 16, 33, lengths=(0, 1, 5, 7, 9)),
        "odd": lambda draw: vocabulary(draw, 3, 5, 37, 101, lengths=(5, 3, 1), return_accuracy=True),
        "ignored-targets": lambda draw: _ignored_targets(vocabulary(draw, 3, 5, 8, 11, lengths=(2, 5, 0))),
        "no-smoothing": lambda draw: vocabulary(draw, 3, 5, 8, 11, label_smoothing=0.0),
        "all-smoothing": lambda draw: vocabulary(draw, 3, 5, 8, 11, label_smoothing=1.0),
        "one-word": lambda draw: vocabulary(draw, 2, 3, 8, 1),
        "one-token": lambda draw: vocabulary(draw, 1, 1, 1, 2),
        "no-rows": lambda draw: vocabulary(draw, 0, 5, 8, 11),
        "no-tokens": lambda draw: vocabulary(draw, 3, 0, 8, 11),
        "extreme-logits": lambda draw: _extreme_vocabulary(vocabulary(draw, 3, 5, 8, 11)),
        "strided": lambda draw: strided(vocabulary(draw, 3, 5, 8, 11, lengths=(2, 5, 1))),
        "misaligned": lambda draw: misaligned(vocabulary(draw, 3, 5, 8, 11)),
        "float32-parameters": lambda draw: _float32_parameters(vocabulary(draw, 3, 5, 21, 150)),
    },
    "intra_video_contrastive_loss": {
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
    },
    "contrastive_reconstruction_loss": {
        "plain": lambda draw: vocabulary(draw, 9, 5, 8, 11, branches=True),
        "published-13x256x1112": lambda draw: vocabulary(
            draw, 6, 13, 256, 1112, branches=True, lengths=(13, 6), beta_1=0.5, beta_2=0.5
        ),
        "lengths-0-1-odd-over": lambda draw: vocabulary(draw, 15, 7, 16, 33, branches=True, lengths=(0, 1, 5, 7, 9)),
        "inactive": lambda draw: vocabulary(draw, 6, 5, 37, 101, branches=True, beta_1=-9.0, beta_2=-9.0),
        "ignored-targets": lambda draw: _ignored_targets(
            vocabulary(draw, 9, 5, 8, 11, branches=True, lengths=(2, 5, 0), label_smoothing=0.3)
        ),
        "one": lambda draw: vocabulary(draw, 3, 1, 1, 2, branches=True, beta_1=3.0, beta_2=3.0),
        "empty-batch": lambda draw: vocabulary(draw, 0, 5, 8, 11, branches=True),
        "extreme-logits": lambda draw: _extreme_vocabulary(vocabulary(draw, 9, 5, 8, 11, branches=True)),
        "strided": lambda draw: strided(vocabulary(draw, 9, 5, 8, 11, branches=True, lengths=(2, 5, 1))),
        "misaligned": lambda draw: misaligned(vocabulary(draw, 9, 5, 8, 11, branches=True)),
    },
    "dropout": {
        "plain": lambda draw: {"x": draw.normal(3, 5, 8), "p": 0.1, "seed": 7},
        "odd-1021": lambda draw: {"x": draw.normal(1021), "p": 0.5, "seed": 8, "offset": 3},
        "rows-of-37": lambda draw: {"x": draw.normal(5, 37), "p": 0.3, "seed": 2**63 - 1, "offset": 2**33 + 5},
        "negative-seed": lambda draw: {"x": draw.normal(33), "p": 0.3, "seed": -5, "offset": 0},
        "seed-tensor": lambda draw: {"x": draw.normal(2, 65), "p": 0.2, "seed": draw.lengths(99)},
        "p-0": lambda draw: {"x": draw.normal(3, 5), "p": 0.0, "seed": 1},
        "p-1": lambda draw: {"x": draw.normal(3, 5), "p": 1.0, "seed": 1},
        "scalar": lambda draw: {"x": draw.normal(), "p": 0.5, "seed": 1},
        "empty": lambda draw: {"x": draw.normal(0, 4), "p": 0.5, "seed": 1},
        "strided": lambda draw: strided({"x": draw.normal(3, 9), "p": 0.5, "seed": 1}),
        "misaligned": lambda draw: misaligned({"x": draw.normal(3, 9), "p": 0.5, "seed": 1}),
    },
    "dropout_add_layer_norm": {
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
        "chosen-none": lambda draw: chosen(draw, add_and_norm(draw, 0, 2, 8), ()),
    },
}


def chosen(draw: Draw, inputs: Inputs, samples: tuple[int, ...] = (6, 0, 3, 6)) -> Inputs:
    """Samples of a larger batch, in any order and more than once."""
    return inputs | {"sample_indices": draw.lengths(*samples)}


def _mask(draw: Draw, shape: tuple[int, ...], length: int, *, alpha: float = 5.5, **options: Any) -> Inputs:
    moment = {"center": draw.uniform(*shape), "width": draw.uniform(*shape, low=0.15)}
    return moment | {"length": length, "alpha": alpha} | options


def sample(op: str, name: str, dtype: torch.dtype, device: str = "cpu") -> Inputs:
    """Fresh keyword arguments for one call of ``op``."""
    return SAMPLES[op][name](Draw(f"{op} {name}", dtype, device))


def targets(op: str, dtypes: Sequence[torch.dtype] = DTYPES) -> list[Any]:
    """pytest parameters (backend, device, dtype): everything that can run ``op`` in this process."""
    return [
        pytest.param(backend, device, dtype, id=name, marks=marks)
        for backend, device, dtype, name, marks in _targets(op, dtypes)
    ] + _missing_devices(3)


def cases(
    names: dict[str, Sequence[str]],
    dtypes: Sequence[torch.dtype] = DTYPES,
    large: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> list[Any]:
    """pytest parameters (op, name, backend, device, dtype): these samples on everything that can run them. ``large``
    ones are slow where a GPU's kernels run on the CPU."""

    def marks_of(op: str, name: str, backend: str, device: str, marks: list[Any]) -> list[Any]:
        stands_in = device == "cpu" and backend not in ("native", "torch")
        return [*marks, pytest.mark.slow] if stands_in and name in large.get(op, ()) else marks

    return [
        pytest.param(
            op,
            name,
            backend,
            device,
            dtype,
            id=f"{op}-{name}-{target}",
            marks=marks_of(op, name, backend, device, marks),
        )
        for op, samples in names.items()
        for backend, device, dtype, target, marks in _targets(op, dtypes)
        for name in samples
    ] + _missing_devices(5)


def with_slow(names: Iterable[str], slow: Collection[str]) -> list[Any]:
    """pytest parameters: these names, those of ``slow`` with its mark."""
    return [pytest.param(name, marks=[pytest.mark.slow] if name in slow else []) for name in names]


def _targets(op: str, dtypes: Sequence[torch.dtype]) -> Iterator[tuple[str, str, torch.dtype, str, list[Any]]]:
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for backend in registry.BACKENDS:
            for dtype in dtypes:
                if registry.unavailable(op, backend, device, dtype) is None:
                    name = f"{backend}-{device}-{str(dtype).removeprefix('torch.')}"
                    yield backend, device, dtype, name, [pytest.mark.gpu] if device == "cuda" else []


def _missing_devices(arguments: int) -> list[Any]:
    """One visibly skipped parameter where there is no GPU."""
    if torch.cuda.is_available():
        return []
    marks = [pytest.mark.gpu, pytest.mark.skip(reason="needs an NVIDIA GPU")]
    return [pytest.param(*[None] * arguments, id="cuda", marks=marks)]


def run(op: str, inputs: Inputs, backend: str) -> tuple[Tensor, ...]:
    """The public function's outputs, as a tuple."""
    with cnm_kernels.use_backend(backend):
        outputs = getattr(cnm_kernels, op)(**inputs)
    return outputs if isinstance(outputs, tuple) else (outputs,)
