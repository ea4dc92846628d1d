"""The model's input: one batch."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """B sentences, each with its video's features. A training batch holds no timestamp.

    Attributes:
        frames: [B, T, frame_dim] float32 or bfloat16, features averaged over T clips.
        frame_lengths: [B] int64, number of real (not padded) clips.
        words: [B, L + 1, word_dim] float32 word vectors; row 0 is reserved for the start token (zeros, never read).
        word_ids: [B, L] int64 vocabulary ids, padding 0.
        word_lengths: [B] int64, words per sentence, 1 to L.
        mask_weights: [B, L] float32, each word's probability of being the first one masked; 0 at padding.
    """

    frames: Tensor
    frame_lengths: Tensor
    words: Tensor
    word_ids: Tensor
    word_lengths: Tensor
    mask_weights: Tensor

    def __len__(self) -> int:
        return self.frames.size(0)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same batch on another device."""
        moved = {field.name: getattr(self, field.name).to(device, non_blocking=non_blocking) for field in fields(self)}
        return Batch(**moved)
