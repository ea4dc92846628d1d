"""A model with the interface of the published CNM: one Gaussian, its complement the easy, none the hard negative."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.research_code.inputs import choose_words, positions, real_positions
from examples.research_code.transformer import DualTransformer


class CNM(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        D = config["hidden_size"]
        self.dropout = config["dropout"]
        self.vocab_size = config["vocab_size"]
        self.alpha = config["alpha"]
        self.max_width = config.get("max_width", 1)
        self.frame_fc = nn.Linear(config["frames_input_size"], D)
        self.word_fc = nn.Linear(config["words_input_size"], D)
        self.mask_vec = nn.Parameter(torch.zeros(config["words_input_size"]))
        self.start_vec = nn.Parameter(torch.zeros(config["words_input_size"]))
        self.trans = DualTransformer(**config["DualTransformer"])
        self.fc_rec = nn.Linear(D, self.vocab_size)
        self.fc_mask_gen = nn.Linear(D, 2)

    def train_only(self, generator: bool) -> None:
        """Either the mask generator or everything else requires gradients."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(("mask_gen" in name) == generator)

    def forward(
        self, frames_feat: Tensor, frames_len: Tensor, words_id: Tensor, words_feat: Tensor, words_len: Tensor,
        weights: Tensor,
    ) -> dict[str, Any]:  # fmt: skip
        """frames_feat [B, T, F], words_feat [B, L + 1, E] (row 0 is the start), words_id and weights [B, L]."""
        B, T, _ = frames_feat.shape
        frames = self.frame_fc(F.dropout(frames_feat, self.dropout, self.training))
        frames_real = real_positions(frames_len, T)
        words = torch.cat([self.start_vec.expand(B, 1, -1), words_feat[:, 1:]], 1)
        words = self.word_fc(F.dropout(words, self.dropout, self.training))
        words_real = real_positions(words_len + 1, words.size(1))
        places = positions(words.size(1), words.size(2)).to(words)

        states = self.trans.ground(frames, frames_real, words + places, words_real)
        center, width = torch.sigmoid(self.fc_mask_gen(states[:, -1])).unbind(1)
        width = width * self.max_width
        if not self.training:
            return {"width": width, "center": center}

        keep = torch.linspace(0, T - 1, T // 4).long()
        frames, frames_real = frames[:, keep], frames_real[:, keep]
        x = torch.linspace(0, 1, T // 4, device=center.device, dtype=center.dtype)
        gaussian = torch.exp(-self.alpha * (x - center[:, None]) ** 2 / width[:, None].clamp(min=0.1) ** 2)
        words = torch.where(choose_words(words_len, weights)[:, :, None], self.word_fc(self.mask_vec), words)
        words, words_real = (words + places)[:, :-1], words_real[:, :-1]

        hidden, attention = self.trans.reconstruct(frames, frames_real, words, words_real, gaussian)
        hard, _ = self.trans.reconstruct(frames, frames_real, words, words_real, None)
        easy, _ = self.trans.reconstruct(frames, frames_real, words, words_real, 1 - gaussian)
        return {
            "words_logit": self.fc_rec(hidden),
            "hard_neg_words_logit": self.fc_rec(hard),
            "easy_neg_words_logit": self.fc_rec(easy),
            "words_id": words_id,
            "words_mask": words_real,
            "width": width,
            "center": center,
            "gauss_weight": gaussian,
            "attn_weight": attention,
        }
