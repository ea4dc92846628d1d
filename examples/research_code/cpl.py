"""A model with the interface of the published CPL: K Gaussian proposals per sentence, their left and right negatives,
and the whole video as reference."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.research_code.inputs import choose_words, positions, real_positions
from examples.research_code.transformer import DualTransformer


class CPL(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        D = config["hidden_size"]
        self.dropout = config["dropout"]
        self.vocab_size = config["vocab_size"]
        self.num_props = config["num_props"]
        self.sigma, self.gamma, self.max_epoch = config["sigma"], config["gamma"], config["max_epoch"]
        self.frame_fc = nn.Linear(config["frames_input_size"], D)
        self.word_fc = nn.Linear(config["words_input_size"], D)
        self.mask_vec = nn.Parameter(torch.zeros(config["words_input_size"]))
        self.start_vec = nn.Parameter(torch.zeros(config["words_input_size"]))
        self.pred_vec = nn.Parameter(torch.zeros(config["frames_input_size"]))
        self.trans = DualTransformer(**config["DualTransformer"])
        self.fc_comp = nn.Linear(D, self.vocab_size)
        self.fc_gauss = nn.Linear(D, 2 * self.num_props)

    def gaussian(self, length: int, center: Tensor, width: Tensor, sigma: float) -> Tensor:
        """[N] -> [N, length]: a density of standard deviation width / sigma, divided by its maximum."""
        x = torch.linspace(0, 1, length, device=center.device, dtype=center.dtype)
        deviation = width[:, None].clamp(min=1e-2) / sigma
        density = torch.exp(-((x - center[:, None]) ** 2) / (2 * deviation**2)) / deviation
        return density / density.max(-1, keepdim=True)[0]

    def negatives(self, length: int, center: Tensor, width: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Gaussians in what the proposal leaves free on its left and right, growing with the epochs."""
        share = 0.5 * min(epoch / self.max_epoch, 1) ** self.gamma
        left = (center - width / 2).clamp(min=0) * share
        right = (1 - center - width / 2).clamp(min=0) * share
        sigma = self.sigma / 2
        return self.gaussian(length, left, left, sigma), self.gaussian(length, 1 - right, right, sigma)

    def forward(
        self, frames_feat: Tensor, frames_len: Tensor, words_id: Tensor, words_feat: Tensor, words_len: Tensor,
        weights: Tensor, epoch: int,
    ) -> dict[str, Any]:  # fmt: skip
        """frames_feat [B, T, F], words_feat [B, L + 1, E] (row 0 is the start), words_id and weights [B, L]."""
        (B, T, _), K = frames_feat.shape, self.num_props
        frames = torch.cat([frames_feat, self.pred_vec.expand(B, 1, -1)], 1)
        frames = self.frame_fc(F.dropout(frames, self.dropout, self.training))
        frames_real = real_positions(frames_len, T + 1)
        words = torch.cat([self.start_vec.expand(B, 1, -1), words_feat[:, 1:]], 1)
        words = self.word_fc(F.dropout(words, self.dropout, self.training))
        words_real = real_positions(words_len + 1, words.size(1))
        places = positions(words.size(1), words.size(2)).to(words)

        states = self.trans.ground(frames, frames_real, words + places, words_real)
        center, width = torch.sigmoid(self.fc_gauss(states[:, -1])).view(B * K, 2).unbind(1)

        keep = torch.linspace(0, T - 1, T // 4).long()
        frames, frames_real = frames[:, keep], frames_real[:, keep]
        words = torch.where(choose_words(words_len, weights)[:, :, None], self.word_fc(self.mask_vec), words)
        words, words_real = (words + places)[:, :-1], words_real[:, :-1]

        def reconstruct(weight: Tensor) -> tuple[Tensor, Tensor]:
            seen, real, read, read_real = (x.repeat_interleave(K, 0) for x in (frames, frames_real, words, words_real))
            return self.trans.reconstruct(seen, real, read, read_real, weight)

        positive = self.gaussian(T // 4, center, width, self.sigma)
        left, right = self.negatives(T // 4, center, width, epoch)
        hidden, attention = reconstruct(positive)
        left_hidden, _ = reconstruct(left)
        right_hidden, _ = reconstruct(right)
        reference, _ = self.trans.reconstruct(frames, frames_real, words, words_real, None)
        return {
            "words_logit": self.fc_comp(hidden),
            "neg_words_logit_1": self.fc_comp(left_hidden),
            "neg_words_logit_2": self.fc_comp(right_hidden),
            "ref_words_logit": self.fc_comp(reference),
            "words_id": words_id,
            "words_mask": words_real,
            "width": width,
            "center": center,
            "gauss_weight": positive,
            "attn_weight": attention,
        }
