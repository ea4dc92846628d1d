"""The training step: two optimizers take turns on every batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import cnm_kernels as kernels
from cnm.config import CNMConfig
from cnm.data.batch import Batch
from cnm.model import CNM, Reconstruction
from cnm.optim import MAX_GRADIENT_NORM, ScheduledAdam


class TrainingStep:
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

    @property
    def num_updates(self) -> int:
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
        first = self._reconstruct(batch, masked_words[0])
        reconstruction_loss = first.nll[0].mean() + first.nll[1].mean()
        reconstructor_norm = self._update(self.reconstructor, reconstruction_loss)

        second = self._reconstruct(batch, masked_words[1])
        contrastive_loss = kernels.intra_video_contrastive_loss(
            *second.nll, beta_1=self.loss.beta_1, beta_2=self.loss.beta_2
        )
        generator_norm = self._update(self.generator, contrastive_loss)

        positive, hard, easy = second.nll.detach().mean(1)
        return {
            "loss/reconstruction": reconstruction_loss.detach(),
            "loss/contrastive": contrastive_loss.detach(),
            "nll/positive": positive,
            "nll/hard": hard,
            "nll/easy": easy,
            "grad_norm/reconstructor": reconstructor_norm,
            "grad_norm/generator": generator_norm,
        }

    def _reconstruct(self, batch: Batch, masked_words: Tensor | None) -> Reconstruction:
        return self.model.reconstruct(
            batch.frames,
            batch.frame_lengths,
            batch.words,
            batch.word_ids,
            batch.word_lengths,
            batch.mask_weights,
            masked_words=masked_words,
        )

    def _update(self, optimizer: ScheduledAdam, loss: Tensor) -> Tensor:
        """Gradients for this group alone, clip over all, update. Returns the norm before the clip."""
        gradients = torch.autograd.grad(loss, optimizer.parameters)
        for parameter, gradient in zip(optimizer.parameters, gradients, strict=True):
            parameter.grad = gradient
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRADIENT_NORM)
        optimizer.update()
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
