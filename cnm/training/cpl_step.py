"""The training step of CPL: one update of everything on every batch.

Of a sentence's K proposals the loss reads the best one, its two negatives and the reference. ``LeanStep`` lets all
proposals compete without a graph and computes those four rows again with one: 4 B rows forward and backward and K B
forward, where the published formulation has (3 K + 1) B both ways.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import cnm_kernels as kernels
from cnm.config import CPLConfig
from cnm.data.batch import Batch
from cnm.models.base import downsample
from cnm.models.cpl import CPL
from cnm.models.reconstructor import MaskedSentences, WeightedClips
from cnm.training.base import ModelStep
from cnm.training.optim import ScheduledAdam


@dataclass(frozen=True)
class Branches:
    """The outputs of one forward pass that the loss reads.

    Attributes:
        positive, left, right, reference: [B], reconstruction errors of the best proposal, its negatives and the whole.
        weights: [B, K, P], all proposals' weights over the clips.
    """

    positive: Tensor
    left: Tensor
    right: Tensor
    reference: Tensor
    weights: Tensor


class TrainingStep(ModelStep):
    """total = reconstruction + alpha_1 contrastive + alpha_2 diversity; one backward, one clip, one update."""

    model: CPL
    draws = 1
    figures = {"loss": "loss/reconstruction", "contrastive": "loss/contrastive"}  # noqa: RUF012

    def __init__(self, model: CPL, config: CPLConfig) -> None:
        self.optimizer = ScheduledAdam(list(model.parameters()), config.train.optimizer)
        super().__init__(model, {"optimizer": self.optimizer})
        self.loss = config.loss
        self.gamma = config.model.config.gamma
        self.max_epoch = config.model.config.max_epoch or config.train.max_num_epochs
        self.growth = model.mask_vec.detach().new_empty(())  # of the negatives; on the device, for CUDA graphs to read
        self.begin_epoch(1)

    def begin_epoch(self, epoch: int) -> None:
        """The negatives grow from epoch to epoch, counted from 1."""
        self.growth.fill_(min(epoch / self.max_epoch, 1) ** self.gamma)

    def _run(self, batch: Batch, masked_words: Sequence[Tensor | None] | None) -> dict[str, Tensor]:
        (mask,) = self._masks(batch, masked_words)
        losses, found = self.losses(batch, mask)
        norm = self._update(self.optimizer, losses["loss/total"])
        nll = {"nll/positive": found.positive, "nll/reference": found.reference}
        nll |= {"nll/left": found.left, "nll/right": found.right}
        means = self._means(
            [*(loss.detach() for loss in losses.values()), *torch.stack(list(nll.values())).detach().mean(1)]
        )
        return {**dict(zip([*losses, *nll], means, strict=True)), "grad_norm": norm}

    def losses(self, batch: Batch, masked_words: Tensor) -> tuple[dict[str, Tensor], Branches]:
        """The loss and its terms, differentiable in all parameters, and what they were made from."""
        found, loss = self.branches(batch, masked_words), self.loss
        reconstruction = (found.positive.mean() + found.reference.mean()) / 2
        contrastive = sum_of_hinges(found, loss.margin_1, loss.margin_2)
        diversity = overlap(found.weights, loss.lambda_)
        total = reconstruction + loss.alpha_1 * contrastive + loss.alpha_2 * diversity
        return {
            "loss/total": total,
            "loss/reconstruction": reconstruction,
            "loss/contrastive": contrastive,
            "loss/diversity": diversity,
        }, found

    @abstractmethod
    def branches(self, batch: Batch, masked_words: Tensor) -> Branches:
        """Reconstructs the batch's masked words [B, L + 1] from the proposals."""


def sum_of_hinges(found: Branches, margin_1: float, margin_2: float) -> Tensor:
    """mean relu(positive - reference + margin_1) + mean relu(positive - left + margin_2) + mean relu(positive - right +
    margin_2), the gradient at a kink one half: CNM's loss, which has two of the three, and half of one with the third
    twice."""
    positive, hinges = found.positive, kernels.intra_video_contrastive_loss
    two = hinges(positive, found.reference, found.left, beta_1=margin_1, beta_2=margin_2)
    return two + hinges(positive, found.right, found.right, beta_1=margin_2, beta_2=margin_2) / 2


def overlap(weights: Tensor, own: float) -> Tensor:
    """mean ||own I - G G^T||^2 of the proposals' weights [B, K, P], G being each divided by its sum."""
    G = weights / weights.sum(-1, keepdim=True)
    target = own * torch.eye(G.size(1), dtype=G.dtype, device=G.device)
    return (target - G @ G.mT).square().sum((1, 2)).mean()


def only(x: Tensor, which: Tensor) -> Tensor:
    """x [B, K, ...] where ``which`` holds, of each sentence once: [B, ...]. An index would have its gradients sorted by
    place before they are added, in nine launches on a GPU."""
    return torch.where(which, x, x.new_zeros(())).sum(1)


class PublishedStep(TrainingStep):
    """Everything computed in full: all proposals, all their negatives, as (3 K + 1) B rows."""

    def branches(self, batch: Batch, masked_words: Tensor) -> Branches:
        found = self.model.reconstruct(batch, masked_words, growth=self.growth)
        positive, best = found.positive.min(1)
        left, right = (nll.gather(1, best[:, None])[:, 0] for nll in (found.left, found.right))
        weights = self.model.positive_weights(found.center, found.width, batch.frames.size(1) // 4)
        return Branches(positive, left, right, found.reference, weights)


class LeanStep(TrainingStep):
    """The published loss and gradients without the work whose result is never used.

    * Of decoding 1 only the last row's state is read: its last layer computes that one query.
    * Proposals compete without a graph; the best one, its negatives and the reference are computed with one. With
      dropout these rows drop what the published formulation's rows of theirs drop.
    * What all rows of a sentence share, in the first layers of both decoders, is computed once.
    * On CPUs cross attentions absorb projections, and padded words are left out of every product.
    """

    recompute = False

    def branches(self, batch: Batch, masked_words: Tensor) -> Branches:
        model, ctx = self.model, self.model.forward_pass(recompute=self.recompute, minimize_flops=True)
        frames, words = model.project_inputs(model.with_prediction(batch.frames), batch.words, batch.word_lengths, ctx)
        center, width = model.generate(frames, batch.frame_lengths, words, batch.word_lengths, ctx, last_only=True)
        clips = WeightedClips(model, *downsample(frames[:, :-1], batch.frame_lengths))
        sentences = MaskedSentences(model, words, masked_words, batch.word_ids, batch.word_lengths, ctx)
        P = clips.clips.size(1)
        weights = model.positive_weights(center, width, P)  # [B, K, P]

        B, K = center.shape
        with torch.no_grad():
            of_all = ctx.of_rows(None)
            best = sentences.nll(clips.under(weights.transpose(0, 1), of_all), of_all).min(0).indices  # [B]
        is_best = torch.arange(K, device=center.device) == best[:, None]  # [B, K]
        chosen = model.negative_weights(only(center, is_best), only(width, is_best), P, self.growth)
        positive = only(weights, is_best[:, :, None])
        key_weights = torch.stack([positive, *chosen, torch.ones_like(positive)])  # [4, B, P]
        # Row k B + b of the published (3 K + 1) B is proposal k of sentence b; then come the negatives.
        branch = torch.stack([best, K + best, 2 * K + best, torch.full_like(best, 3 * K)])
        of_chosen = ctx.of_rows((branch * B + torch.arange(B, device=center.device)).flatten())
        nll = sentences.nll(clips.under(key_weights, of_chosen), of_chosen)
        positive_nll, left_nll, right_nll, reference_nll = nll.unbind(0)
        return Branches(positive_nll, left_nll, right_nll, reference_nll, weights)


class RecomputingStep(LeanStep):
    """The lean step, bit for bit, in less memory: much of every layer is computed again in the backward."""

    recompute = True


STEPS: dict[str, type[TrainingStep]] = {"lean": LeanStep, "recompute": RecomputingStep, "published": PublishedStep}
