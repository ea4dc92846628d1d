"""Inputs of both models: masks of real positions, sinusoidal positions, masked words."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def real_positions(lengths: Tensor, size: int) -> Tensor:
    """[B, size] uint8, 1 at the first ``lengths`` [B] positions."""
    return (torch.arange(size, device=lengths.device) < lengths[:, None]).to(torch.uint8)


def positions(length: int, d_model: int) -> Tensor:
    """[length, d_model]: sines, then cosines; position 0 is zero."""
    half = d_model // 2
    frequencies = torch.exp(-math.log(10000) / (half - 1) * torch.arange(half))
    angles = torch.arange(length)[:, None] * frequencies
    table = torch.cat([angles.sin(), angles.cos()], 1)
    table[0] = 0
    return table


def choose_words(lengths: Tensor, weights: Tensor) -> Tensor:
    """A third of each sentence, at least one word, drawn by ``weights`` [B, L]: [B, L + 1] bool, the start left out."""
    chosen = torch.zeros(weights.size(0), weights.size(1) + 1, dtype=torch.bool)
    for row, (length, weight) in enumerate(zip(lengths.tolist(), weights.cpu(), strict=True)):
        chosen[row, 1 + torch.multinomial(weight[:length], max(length // 3, 1))] = True
    return chosen.to(weights.device)
