"""The training step: two optimizers take turns on every batch.

``PublishedStep`` computes both losses as the paper states them. ``LeanStep`` computes the same losses and gradients
without the work whose result is never used; the trainer uses it by default.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import cnm_kernels as kernels
from cnm.config import CNMConfig
from cnm.data.batch import Batch
from cnm.distributed import Group
from cnm.models.cnm import CNM, Reconstruction, downsample, sample_masked_words
from cnm.models.layers import ForwardPass, Source
from cnm.training.optim import MAX_GRADIENT_NORM, ScheduledAdam


def _all_finite(tensors: Sequence[Tensor]) -> bool:
    return bool(torch.stack([tensor.detach().isfinite().all() for tensor in tensors]).all())


class TrainingStep(ABC):
    """Both published updates of one batch.

    1. All parameters but ``fc_mask_gen`` learn to reconstruct: mean(nll_positive) + mean(nll_hard), back-propagated
       through the Gaussian into decoding 1.
    2. With those updated, ``fc_mask_gen`` alone learns the contrastive loss, on fresh dropout and word masks.

    As published, each gradient clip takes its norm over all parameters, so that the other group's gradients from its
    last update count in it.
    """

    def __init__(self, model: CNM, config: CNMConfig) -> None:
        generator = list(model.fc_mask_gen.parameters())
        of_generator = {id(parameter) for parameter in generator}
        reconstructor = [parameter for parameter in model.parameters() if id(parameter) not in of_generator]
        self.model = model
        self.loss = config.loss
        self.generator = ScheduledAdam(generator, config.train.generator)
        self.reconstructor = ScheduledAdam(reconstructor, config.train.reconstructor)
        self.group: Group | None = None  # processes that share each batch
        self.share = 1.0  # of the batch that is this process's
        self.skip_nonfinite = False  # whether an update whose loss or gradients are not finite is left out
        self.fixed_gradients = False  # whether gradients keep their places in memory, as a CUDA graph needs

    @property
    def num_updates(self) -> int:
        """Batches trained on so far."""
        return self.reconstructor.updates

    @property
    def learning_rate(self) -> float:
        """The reconstructor's rate in the next update."""
        return self.reconstructor.learning_rate

    def __call__(
        self, batch: Batch, *, masked_words: tuple[Tensor | None, Tensor | None] = (None, None)
    ) -> dict[str, Tensor]:
        """Trains on one batch, which stays as it is.

        Args:
            batch: on the model's device.
            masked_words: the words to hide in update 1 and 2, [B, L + 1] bool each; None draws them.

        Returns:
            Losses, per-branch nll and gradient norms, as 0-dim tensors on the device (nothing waits for the host).
        """
        self.advance()
        return self.run(batch, masked_words=masked_words)

    def advance(self) -> None:
        """The host's part of a step: counts the updates and sets their rates."""
        self.reconstructor.advance()
        self.generator.advance()

    def run(
        self, batch: Batch, *, masked_words: tuple[Tensor | None, Tensor | None] = (None, None)
    ) -> dict[str, Tensor]:
        """The device's part of a step: it waits for nothing and its shapes depend on the batch's alone."""
        masks = [
            sample_masked_words(batch.mask_weights, batch.word_lengths) if given is None else given
            for given in masked_words
        ]
        reconstruction_loss = self.reconstruction_loss(batch, masks[0])
        reconstructor_norm = self._update(self.reconstructor, reconstruction_loss)

        self._reconstructor_requires_grad(False)
        contrastive_loss, nll = self.contrastive_loss(batch, masks[1])
        generator_norm = self._update(self.generator, contrastive_loss)
        self._reconstructor_requires_grad(True)

        means = [reconstruction_loss.detach(), contrastive_loss.detach(), *nll.detach().mean(1)]
        if self.group is not None:
            means = self.group.sum(means, self.share)
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

    def _update(self, optimizer: ScheduledAdam, loss: Tensor) -> Tensor:
        """Gradients for this group alone, clip over all, update. Returns the norm before the clip."""
        gradients: Sequence[Tensor] = torch.autograd.grad(loss, optimizer.parameters)
        if self.group is not None:
            gradients = self.group.sum(gradients, self.share)
        if self.skip_nonfinite and not _all_finite([loss, *gradients]):  # waits for the device
            return loss.new_full((), math.nan)
        for parameter, gradient in zip(optimizer.parameters, gradients, strict=True):
            if self.fixed_gradients and parameter.grad is not None:
                parameter.grad.copy_(gradient)
            else:
                parameter.grad = gradient
        everybody = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(everybody)
        # What the clip would make of the other group's gradients nobody reads: its next update brings new ones.
        torch.nn.utils.clip_grads_with_norm_(optimizer.parameters, MAX_GRADIENT_NORM, norm)
        optimizer.apply()
        return norm

    def state_dict(self) -> dict[str, Any]:
        """Both optimizers, and the generator's last gradients, which the next clip counts: an exact resume."""
        return {
            "generator": self.generator.state_dict(),
            "reconstructor": self.reconstructor.state_dict(),
            "generator_gradients": [parameter.grad for parameter in self.generator.parameters],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what ``state_dict`` gave."""
        self.generator.load_state_dict(state["generator"])
        self.reconstructor.load_state_dict(state["reconstructor"])
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
        model, run = self.model, self.model.forward_pass(recompute=self.recompute, frugal=True)
        frames, words = model.project_inputs(batch.frames, batch.words, batch.word_lengths, run)
        center, width = model.generate(frames, batch.frame_lengths, words, batch.word_lengths, run, last_only=True)
        inputs = _ReconstructorInputs(model, batch, frames, words, masked_words, run)
        gaussian = inputs.gaussian(center, width)
        nll = inputs.nll([gaussian, torch.ones_like(gaussian)], run)
        return nll[0].mean() + nll[1].mean()

    def contrastive_loss(self, batch: Batch, masked_words: Tensor) -> tuple[Tensor, Tensor]:
        model, run = self.model, self.model.forward_pass(recompute=self.recompute, frugal=True)
        frames, words = model.project_inputs(batch.frames, batch.words, batch.word_lengths, run)
        center, width = model.generate(frames, batch.frame_lengths, words, batch.word_lengths, run, last_only=True)
        inputs = _ReconstructorInputs(model, batch, frames, words, masked_words, run)
        gaussian = inputs.gaussian(center, width)
        positive, easy = inputs.nll([gaussian, 1 - gaussian], run)
        with torch.no_grad():
            (hard,) = inputs.nll([torch.ones_like(gaussian)], run)
        loss = kernels.intra_video_contrastive_loss(
            positive, hard, easy, beta_1=self.loss.beta_1, beta_2=self.loss.beta_2
        )
        return loss, torch.stack([positive, hard, easy])


class _ReconstructorInputs:
    """What the branches of decoding 2 share: inputs, targets and the first layers' projections."""

    def __init__(
        self, model: CNM, batch: Batch, frames: Tensor, words: Tensor, masked_words: Tensor, run: ForwardPass
    ) -> None:
        self.model = model
        self.frames, self.frame_lengths = downsample(frames, batch.frame_lengths)
        self.words, self.row_lengths = model.reconstructor_words(words, masked_words, batch.word_lengths)
        self.word_ids = batch.word_ids
        frame_attention = model.trans.decoder1.layers[0].self_attn
        self.frame_projections = frame_attention.project(self.frames)
        first_of_words = model.trans.decoder2.layers[0]
        attention, rows = first_of_words.self_attn, first_of_words.rows(self.row_lengths, run)
        packed_words = attention.project(self.words, rows)
        self.attended_words = attention.attend(packed_words, None, self.row_lengths, None, causal=True, rows=rows)

    def gaussian(self, center: Tensor, width: Tensor) -> Tensor:
        """The positive's key weights. [B, P]"""
        return kernels.gaussian_mask(center, width, self.frames.size(1), alpha=self.model.alpha)

    def nll(self, key_weights: list[Tensor], run: ForwardPass) -> Tensor:
        """Reconstruction error of each branch, given its key weights [B, P]: [len(key_weights), B]."""
        model, n = self.model, len(key_weights)
        frame_lengths, row_lengths = self.frame_lengths.repeat(n), self.row_lengths.repeat(n)
        weighting = torch.cat(key_weights)  # [n B, P]

        first, *later = model.trans.decoder1.layers
        attended = first.self_attn.attend_branches(
            self.frame_projections, self.frame_lengths, weighting.unflatten(0, (n, -1))
        )
        entered = run.add_and_norm(attended, self.frames.repeat(n, 1, 1), first.self_attn_layer_norm)
        frames = run.layer(lambda run: first.after_self_attention(entered, frame_lengths, run, None))
        for layer in later:
            frames = layer(frames, frame_lengths, run, weighting)
        source = Source(frames, frame_lengths, weighting)

        first_of_words, *later = model.trans.decoder2.layers
        entered_words = run.add_and_norm(
            self.attended_words.repeat(n, 1, 1), self.words.repeat(n, 1, 1), first_of_words.self_attn_layer_norm
        )
        words = run.layer(lambda run: first_of_words.after_self_attention(entered_words, row_lengths, run, source))
        for layer in later:
            words = layer(words, row_lengths, run, source=source)
        nll = kernels.linear_nll(words, model.fc_rec.weight, model.fc_rec.bias, self.word_ids.repeat(n, 1), row_lengths)
        return nll.view(n, -1)


class RecomputingStep(LeanStep):
    """The lean step, bit for bit, in half its memory: layers are computed again in the backward instead of kept."""

    recompute = True


STEPS: dict[str, type[TrainingStep]] = {"lean": LeanStep, "recompute": RecomputingStep, "published": PublishedStep}
