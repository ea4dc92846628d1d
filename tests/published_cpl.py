"""The published CPL and its training step, written down plainly: the oracle of ``cnm.models.cpl``.

Ordinary PyTorch and nothing of this project; the decoders, the optimizer and the losses' terms that CPL shares with CNM
come from ``published.py``. It spends what the published formulation spends: (3 K + 1) branches in full.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from published import CommonSizes, Decoder, PublishedAdam, Schedule, clip, learning_rate, nll_loss, positions, within
from torch import Tensor, nn


@dataclass(frozen=True)
class Sizes(CommonSizes):
    """Hyperparameters of the network."""

    num_props: int
    sigma: float = 9.0
    gamma: float = 0.5
    max_epoch: int = 30
    num_layers: int = 3
    dropout: float = 0.0


@dataclass(frozen=True)
class Loss:
    """Weights and margins."""

    own: float  # lambda
    alpha_1: float
    alpha_2: float
    margin_1: float = 0.1
    margin_2: float = 0.15


@dataclass(frozen=True)
class Output:
    """The results of a forward pass."""

    center: Tensor  # [B, K]
    width: Tensor
    positive: Tensor  # nll [B, K]
    left: Tensor
    right: Tensor
    reference: Tensor  # [B]
    weight: Tensor  # [B, K, P]


class PublishedCPL(nn.Module):
    """frames [B, T, frame_dim], words [B, L + 1, word_dim] (row 0 is overwritten), word_ids [B, L]."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        D = sizes.d_model
        self.sizes = sizes
        self.frame_fc = nn.Linear(sizes.frame_dim, D)
        self.word_fc = nn.Linear(sizes.word_dim, D)
        self.mask_vec = nn.Parameter(torch.zeros(sizes.word_dim))
        self.start_vec = nn.Parameter(torch.zeros(sizes.word_dim))
        self.pred_vec = nn.Parameter(torch.zeros(sizes.frame_dim))
        self.trans = nn.Module()
        self.trans.decoder1 = Decoder(sizes.num_layers, D, sizes.num_heads, sizes.dropout)
        self.trans.decoder2 = Decoder(sizes.num_layers, D, sizes.num_heads, sizes.dropout)
        self.fc_comp = nn.Linear(D, sizes.vocab_size)
        self.fc_gauss = nn.Linear(D, 2 * sizes.num_props)

    def forward(
        self,
        frames: Tensor,
        frame_lengths: Tensor,
        words: Tensor,
        word_ids: Tensor,
        word_lengths: Tensor,
        masked_words: Tensor,
        epoch: int,
        negatives: bool = True,
    ) -> Output:
        sizes, (B, T, _), L = self.sizes, frames.shape, word_ids.size(1)
        K, P = sizes.num_props, T // 4
        frame_real, word_real = within(frame_lengths, T + 1), within(word_lengths + 1, L + 1)
        frames = torch.cat([frames, self.pred_vec.expand(B, 1, -1)], dim=1)
        words = words.clone()
        words[:, 0] = self.start_vec
        frames = self.frame_fc(F.dropout(frames, sizes.dropout, self.training))
        words = self.word_fc(F.dropout(words, sizes.dropout, self.training))
        place = positions(L + 1, words.size(2)).to(words)

        sentence = self.trans.decoder2(words + place, word_real)
        states = self.trans.decoder1(frames, frame_real, None, sentence, word_real, None)
        gauss = torch.sigmoid(self.fc_gauss(states[:, -1])).view(B * K, 2)
        center, width = gauss[:, 0], gauss[:, 1]

        keep = torch.linspace(0, T - 1, P).long()
        frames, frame_real = frames[:, :-1][:, keep], frame_real[:, :-1][:, keep]
        words = torch.where(masked_words[:, :, None], self.word_fc(self.mask_vec), words)
        words, word_real = (words + place)[:, :-1], word_real[:, :-1]

        def errors(weight: Tensor | None, copies: int) -> Tensor:
            seen, seen_real, read, read_real, ids = (
                x.repeat_interleave(copies, dim=0) for x in (frames, frame_real, words, word_real, word_ids)
            )
            source = self.trans.decoder1(seen, seen_real, weight)
            state = self.trans.decoder2(read, read_real, None, source, seen_real, weight)
            return nll_loss(self.fc_comp(state), ids, read_real)

        weight = normalized_gaussian(center, width, P, sizes.sigma)
        positive = errors(weight, K).view(B, K)
        if not negatives:
            return Output(center.view(B, K), width.view(B, K), positive, positive, positive, positive[:, 0], weight)
        share = 0.5 * min(epoch / sizes.max_epoch, 1) ** sizes.gamma
        left = share * (center - width / 2).clamp(min=0)
        right = share * (1 - center - width / 2).clamp(min=0)
        left_error = errors(normalized_gaussian(left, left, P, sizes.sigma / 2), K).view(B, K)
        right_error = errors(normalized_gaussian(1 - right, right, P, sizes.sigma / 2), K).view(B, K)
        reference = errors(None, 1)
        return Output(
            center.view(B, K), width.view(B, K), positive, left_error, right_error, reference, weight.view(B, K, P)
        )


def normalized_gaussian(center: Tensor, width: Tensor, length: int, sigma: float) -> Tensor:
    """exp(-(x - c)^2 / 2 s^2) with s = max(w, 0.01) / sigma, divided by its largest sample. [N] -> [N, length]"""
    x = torch.linspace(0, 1, length, dtype=center.dtype, device=center.device)
    deviation = width.clamp(min=0.01) / sigma
    weight = torch.exp(-((x[None] - center[:, None]) ** 2) / (2 * deviation[:, None] ** 2))
    return weight / weight.max(dim=1, keepdim=True)[0]


def losses(output: Output, loss: Loss) -> dict[str, Tensor]:
    """The loss and its terms."""
    best, index = output.positive.min(dim=1)
    left, right = (errors.gather(1, index[:, None])[:, 0] for errors in (output.left, output.right))
    zero = torch.zeros_like(best)
    reconstruction = (best.mean() + output.reference.mean()) / 2
    contrastive = (
        torch.max(best - output.reference + loss.margin_1, zero).mean()
        + torch.max(best - left + loss.margin_2, zero).mean()
        + torch.max(best - right + loss.margin_2, zero).mean()
    )
    G = output.weight / output.weight.sum(dim=2, keepdim=True)
    gap = loss.own * torch.eye(G.size(1)).to(G) - torch.bmm(G, G.transpose(1, 2))
    diversity = torch.linalg.matrix_norm(gap).square().mean()
    return {
        "loss/total": reconstruction + loss.alpha_1 * contrastive + loss.alpha_2 * diversity,
        "loss/reconstruction": reconstruction,
        "loss/contrastive": contrastive,
        "loss/diversity": diversity,
    }


class PublishedCPLStep:
    """One backward, one clip over everything, one update."""

    def __init__(self, model: PublishedCPL, schedule: Schedule, loss: Loss) -> None:
        self.model, self.schedule, self.loss = model, schedule, loss
        self.parameters = list(model.parameters())
        self.adam = PublishedAdam(self.parameters, schedule.weight_decay)

    def __call__(self, inputs: tuple[Tensor, ...], masked_words: Tensor, epoch: int) -> dict[str, Tensor]:
        """inputs: (frames, frame_lengths, words, word_ids, word_lengths)"""
        for parameter in self.parameters:
            parameter.grad = None
        found = losses(self.model(*inputs, masked_words, epoch), self.loss)
        found["loss/total"].backward()
        norm = clip([parameter.grad for parameter in self.parameters])
        schedule = self.schedule
        rate = learning_rate(self.adam.updates, schedule.lr, schedule.warmup_updates, schedule.warmup_init_lr)
        self.adam.step(rate)
        return {name: value.detach() for name, value in found.items()} | {"grad_norm": norm}
