"""Seeded tensors for the samples, and the memory layouts that samples may have."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]  # the keyword arguments of one call of a public function


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
