"""The interface between trainer and training steps, and the update that all steps share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from cnm.data.batch import Batch
from cnm.distributed import Group
from cnm.masking import sample_masked_words
from cnm.models import base as models
from cnm.models.base import Model
from cnm.training.optim import MAX_GRADIENT_NORM, ScheduledAdam
from cnm_kernels.parameter_uses import ParameterUses, fused

CLIP_EPS = 1e-6  # what PyTorch adds to a norm before it clips by it


def _all_finite(tensors: Sequence[Tensor]) -> bool:
    return bool(torch.stack([tensor.detach().isfinite().all() for tensor in tensors]).all())


class ModelStep(ABC):
    """All updates of one batch.

    Args:
        optimizers: by their name in the configuration's training section; the first one's updates are counted.

    Attributes:
        draws: how often a batch's words are masked.
        figures: metrics to show while training, by a short name.
        group: processes that share each batch.
        share: of the batch that is this process's.
        skip_nonfinite: whether an update whose loss or gradients are not finite is left out.
        fixed_gradients: whether gradients keep their places in memory, as a CUDA graph needs.
    """

    draws: int
    figures: dict[str, str]

    def __init__(self, model: Model, optimizers: dict[str, ScheduledAdam]) -> None:
        self.model = model
        self.optimizers = optimizers
        self.group: Group | None = None
        self.share = 1.0
        self.skip_nonfinite = False
        self.fixed_gradients = False
        self._uses: ParameterUses | None = None

    @property
    def _first(self) -> ScheduledAdam:
        return next(iter(self.optimizers.values()))

    @property
    def _last(self) -> ScheduledAdam:
        return next(reversed(self.optimizers.values()))

    @property
    def num_updates(self) -> int:
        """Batches trained on so far."""
        return self._first.updates

    @property
    def learning_rate(self) -> float:
        """The rate in the next update."""
        return self._first.learning_rate

    def begin_epoch(self, epoch: int) -> None:  # noqa: B027  a step may have nothing that depends on it
        """Called before the first update of each epoch, counted from 1, and again where training resumes within it."""

    def __call__(self, batch: Batch, *, masked_words: Sequence[Tensor | None] | None = None) -> dict[str, Tensor]:
        """Trains on one batch, which stays as it is.

        Args:
            batch: on the model's device.
            masked_words: the words to hide in each of ``draws``, [B, L + 1] bool; None draws them.

        Returns:
            Losses, per-branch nll and gradient norms, as 0-dim tensors on the device (nothing waits for the host).
        """
        self.advance()
        return self.run(batch, masked_words=masked_words)

    @contextmanager
    def _parameters_in_use(self) -> Iterator[None]:
        """Within, on GPUs, parameters are cast and their gradients added by a few kernels for all of them."""
        if next(self.model.parameters()).device.type in models.MATMUL_BOUND_DEVICES:
            yield
            return
        if self._uses is None:
            self._uses = ParameterUses(self.model.parameters(), self.model.compute_dtype)
        with self._uses:
            yield

    def advance(self) -> None:
        """The host's part of a step: counts the updates and sets their rates."""
        for optimizer in self.optimizers.values():
            optimizer.advance()

    def run(self, batch: Batch, *, masked_words: Sequence[Tensor | None] | None = None) -> dict[str, Tensor]:
        """The device's part of a step: it waits for nothing and its shapes depend on the batch's alone."""
        with self._parameters_in_use():
            return self._run(batch, masked_words)

    @abstractmethod
    def _run(self, batch: Batch, masked_words: Sequence[Tensor | None] | None) -> dict[str, Tensor]:
        """All updates of the batch."""

    def _masks(self, batch: Batch, given: Sequence[Tensor | None] | None) -> list[Tensor]:
        return [
            sample_masked_words(batch.mask_weights, batch.word_lengths) if mask is None else mask
            for mask in (given or [None] * self.draws)
        ]

    def _means(self, means: list[Tensor]) -> list[Tensor]:
        """Returns the means over the whole batch, also if processes share it."""
        return means if self.group is None else self.group.sum(means, self.share)

    def _update(self, optimizer: ScheduledAdam, loss: Tensor) -> Tensor:
        """Gradients for this group alone, clip over all, update. Returns the norm before the clip."""
        by = torch.autograd.grad if self._uses is None else self._uses.gradients
        gradients: Sequence[Tensor] = by(loss, optimizer.parameters)
        if self.group is not None:
            gradients = self.group.sum(gradients, self.share)
        # Gradients alone decide among processes: summed, they are the same in all, and all skip the same updates.
        looked_at = [] if self.group is not None else [loss]
        if self.skip_nonfinite and not _all_finite([*looked_at, torch.nn.utils.get_total_norm(gradients)]):
            # That waits for the device. Finite gradients may have a norm that is not.
            for parameter in optimizer.parameters:  # the other group's clip counts them, and a resumed run has none
                parameter.grad = None
            return loss.new_full((), math.nan)
        places = [parameter.grad for parameter in optimizer.parameters if parameter.grad is not None]
        if self.fixed_gradients and len(places) == len(gradients):
            fused("copy_", places, gradients)
        else:
            for parameter, gradient in zip(optimizer.parameters, gradients, strict=True):
                parameter.grad = gradient
        everybody = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(everybody)
        # Another group's gradients are not clipped: its next update overwrites them before they are used. On a CPU the
        # norm is at hand, and a loop over each gradient, which would multiply it by 1, is spared where that is small.
        if norm.device.type not in models.MATMUL_BOUND_DEVICES or not norm + CLIP_EPS <= MAX_GRADIENT_NORM:
            torch.nn.utils.clip_grads_with_norm_(optimizer.parameters, MAX_GRADIENT_NORM, norm)
        optimizer.apply()
        if self._uses is not None and optimizer is not self._last:
            self._uses.refresh()
        return norm

    def state_dict(self) -> dict[str, Any]:
        """The optimizers: an exact resume."""
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what ``state_dict`` gave."""
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state[name])
