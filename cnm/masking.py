"""Selects the words to hide for reconstruction: computes each word's weight, and draws from these weights."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

CONTENT_WEIGHT, FUNCTION_WEIGHT = 2.0, 1.0  # before the softmax, as published


def mask_weights(content: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Each word's probability of being the first one masked: softmax of 2 for content words and 1 for the others.

    Args:
        content: [B, L] bool.
        lengths: [B], words per sentence.

    Returns:
        [B, L] float32, 0 at padding.
    """
    real = np.arange(content.shape[1]) < lengths[:, None]
    weight = np.exp(np.where(content, CONTENT_WEIGHT, FUNCTION_WEIGHT)) * real
    total = weight.sum(1, keepdims=True)
    return (weight / np.where(total == 0, 1, total)).astype(np.float32)


def sample_masked_words(mask_weights: Tensor, word_lengths: Tensor, exponential_noise: Tensor | None = None) -> Tensor:
    """Draws max(l // 3, 1) of each sentence's l words without replacement, at once.

    Each word finishes at an exponential time of rate ``mask_weights``; the earliest are masked. That is the law of
    drawing one word after the other with probability proportional to its weight among those left.

    Args:
        mask_weights: [B, L] >= 0, 0 at padding.
        word_lengths: [B] int64.
        exponential_noise: draws [B, L]; None draws them.

    Returns:
        [B, L + 1] bool: row 0, the start token, is never masked.
    """
    exponential_noise = (
        torch.empty_like(mask_weights).exponential_() if exponential_noise is None else exponential_noise
    )
    finish = exponential_noise / mask_weights
    rank = finish.argsort(dim=1).argsort(dim=1)
    count = (word_lengths // 3).clamp_min(1).minimum(word_lengths)
    return nn.functional.pad(rank < count[:, None], (1, 0))


def fixed_masked_words(mask_weights: Tensor, word_lengths: Tensor, count: int, seed: int = 0) -> list[Tensor]:
    """``count`` draws of ``sample_masked_words`` that depend on the sentence and the seed alone: not on the batch
    it lies in, its place there, or what was drawn before. [B, L + 1] bool each"""
    L = mask_weights.size(1)
    noises = (np.random.default_rng([seed, draw]).exponential(size=L) for draw in range(count))
    return [
        sample_masked_words(
            mask_weights, word_lengths, torch.from_numpy(exponential_noise).to(mask_weights).expand_as(mask_weights)
        )
        for exponential_noise in noises
    ]
