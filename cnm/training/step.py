"""The training step: two optimizers take turns on every batch.

``PublishedStep`` computes both losses as the paper states them. ``LeanStep`` computes the same losses and gradients
without the work whose result is never used; the trainer uses it by default.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import cnm_kernels as kernels
from cnm.config import CNMConfig
from cnm.data.batch import Batch
from cnm.models.base import downsample
from cnm.models.cnm import CNM, Reconstruction
from cnm.models.reconstructor import MaskedSentences, WeightedClips
from cnm.training.base import ModelStep
from cnm.training.optim import ScheduledAdam


class TrainingStep(ModelStep):
    """Both published updates of one batch.

    1. All parameters but ``fc_mask_gen`` learn to reconstruct: mean(nll_positive) + mean(nll_hard), back-propagated
       through the Gaussian into decoding 1.
    2. With those updated, ``fc_mask_gen`` alone learns the contrastive loss, on fresh dropout and word masks.

    As published, each gradient clip takes its norm over all parameters, so that the other group's gradients from its
    last update count in it.
    """

    model: CNM
    draws = 2
    figures = {"loss": "loss/reconstruction", "contrastive": "loss/contrastive"}  # noqa: RUF012

    def __init__(self, model: CNM, config: CNMConfig) -> None:
        generator = list(model.fc_mask_gen.parameters())
        of_generator = {id(parameter) for parameter in generator}
        reconstructor = [parameter for parameter in model.parameters() if id(parameter) not in of_generator]
        self.generator = ScheduledAdam(generator, config.train.generator)
        self.reconstructor = ScheduledAdam(reconstructor, config.train.reconstructor)
        super().__init__(model, {"reconstructor": self.reconstructor, "generator": self.generator})
        self.loss = config.loss

    def _run(self, batch: Batch, masked_words: Sequence[Tensor | None] | None) -> dict[str, Tensor]:
        first, second = self._masks(batch, masked_words)
        reconstruction_loss = self.reconstruction_loss(batch, first)
        reconstructor_norm = self._update(self.reconstructor, reconstruction_loss)

        self._reconstructor_requires_grad(False)
        try:
            contrastive_loss, nll = self.contrastive_loss(batch, second)
            generator_norm = self._update(self.generator, contrastive_loss)
        finally:  # where a CUDA graph could not be captured, the step runs again
            self._reconstructor_requires_grad(True)

        means = self._means([reconstruction_loss.detach(), contrastive_loss.detach(), *nll.detach().mean(1)])
        names = ("loss/reconstruction", "loss/contrastive", "nll/positive", "nll/hard", "nll/easy")
        return {
            **dict(zip(names, means, strict=True)),
            "grad_norm/reconstructor": reconstructor_norm,
            "grad_norm/generator": generator_norm,
        }

    @abstractmethod
    def reconstruction_loss(self, batch: Batch, masked_words: Tensor) -> Tensor:
        """mean(nll_positive) + mean(nll_hard), differentiable in the reconstructor's parameters."""

    @abstractmethod
    def contrastive_loss(self, batch: Batch, masked_words: Tensor) -> tuple[Tensor, Tensor]:
        """The contrastive loss, differentiable in ``fc_mask_gen``, and the branches' nll [3, B]."""

    def _reconstructor_requires_grad(self, required: bool) -> None:
        for parameter in self.reconstructor.parameters:
            parameter.requires_grad_(required)

    def state_dict(self) -> dict[str, Any]:
        """Both optimizers, and the generator's last gradients, which the next clip counts: an exact resume."""
        gradients = [parameter.grad for parameter in self.generator.parameters]
        return super().state_dict() | {"generator_gradients": gradients}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what ``state_dict`` gave."""
        super().load_state_dict(state)
        for parameter, gradient in zip(self.generator.parameters, state["generator_gradients"], strict=True):
            parameter.grad = None if gradient is None else gradient.to(parameter.device, parameter.dtype).clone()


class PublishedStep(TrainingStep):
    """Both losses as the paper states them: everything computed in full, each branch by itself."""

    def reconstruction_loss(self, batch: Batch, masked_words: Tensor) -> Tensor:
        nll = self._reconstruct(batch, masked_words).nll
        return nll[0].mean() + nll[1].mean()

    def contrastive_loss(self, batch: Batch, masked_words: Tensor) -> tuple[Tensor, Tensor]:
        nll = self._reconstruct(batch, masked_words).nll
        loss = kernels.intra_video_contrastive_loss(*nll, beta_1=self.loss.beta_1, beta_2=self.loss.beta_2)
        return loss, nll

    def _reconstruct(self, batch: Batch, masked_words: Tensor) -> Reconstruction:
        return self.model.reconstruct(
            batch.frames,
            batch.frame_lengths,
            batch.words,
            batch.word_ids,
            batch.word_lengths,
            masked_words=masked_words,
        )


class LeanStep(TrainingStep):
    """The published losses and gradients without the work whose result is never used.

    * Of decoding 1 only the last frame's state is read: its last layer computes that one query.
    * The reconstruction loss never reads the easy negative: it is left out.
    * The contrastive loss trains ``fc_mask_gen`` alone: decoding 1 and the hard negative need no graph, the other two
      branches gradients through the Gaussian only.
    * The branches enter both decoders with the same input: the first layers' projections and scores are computed once,
      and later layers run on all branches as one batch. The key weights of that batch are rows of g, ones and 1 - g.
    * On CPUs projections are absorbed into the side of a cross attention that has fewer rows (the keys where 200 frames
      ask some words, the queries where some words ask 50 clips, or the last frame all others), and padded words are
      left out of every product.
    """

    recompute = False

    def reconstruction_loss(self, batch: Batch, masked_words: Tensor) -> Tensor:
        branches = _Branches(self.model, batch, masked_words, recompute=self.recompute)
        nll = branches.nll(branches.gaussian, torch.ones_like(branches.gaussian))
        return nll.mean(1).sum()

    def contrastive_loss(self, batch: Batch, masked_words: Tensor) -> tuple[Tensor, Tensor]:
        branches = _Branches(self.model, batch, masked_words)
        positive, easy = branches.nll(branches.gaussian, 1 - branches.gaussian)
        with torch.no_grad():
            (hard,) = branches.nll(torch.ones_like(branches.gaussian))
        loss = kernels.intra_video_contrastive_loss(
            positive, hard, easy, beta_1=self.loss.beta_1, beta_2=self.loss.beta_2
        )
        return loss, torch.stack([positive, hard, easy])


class _Branches:
    """One forward pass up to where the branches of decoding 2 part: they share inputs and the first projections.

    Attributes:
        gaussian: [B, P], the positive branch's key weights.
    """

    def __init__(self, model: CNM, batch: Batch, masked_words: Tensor, *, recompute: bool = False) -> None:
        self.ctx = model.forward_pass(recompute=recompute, minimize_flops=True)
        frames, words = model.project_inputs(batch.frames, batch.words, batch.word_lengths, self.ctx)
        center, width = model.generate(frames, batch.frame_lengths, words, batch.word_lengths, self.ctx, last_only=True)
        self.clips = WeightedClips(model, *downsample(frames, batch.frame_lengths))
        self.sentences = MaskedSentences(model, words, masked_words, batch.word_ids, batch.word_lengths, self.ctx)
        self.gaussian = kernels.gaussian_mask(center, width, self.clips.clips.size(1), alpha=model.alpha)

    def nll(self, *key_weights: Tensor) -> Tensor:
        """Reconstruction error of each branch, given its key weights [B, P]: [len(key_weights), B]."""
        return self.sentences.nll(self.clips.under(torch.stack(key_weights), self.ctx), self.ctx)


class RecomputingStep(LeanStep):
    """The lean step, bit for bit, in less than half its memory.

    Of every layer its input and the results of self-attention and of feed-forward are kept, the rest is computed again
    in the backward: it fills the most memory for the time that it takes. The contrastive loss trains one small layer
    and keeps less than that as it is.
    """

    recompute = True


STEPS: dict[str, type[TrainingStep]] = {"lean": LeanStep, "recompute": RecomputingStep, "published": PublishedStep}
